"""A minute of many clients, of which some hang up or read slowly."""

import json

import pytest

from ..conftest import run_python


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(32, "64 clients for 60 s, of which a fifth hangs up and a fifth reads slowly")
def test_a_minute_of_64_clients(record_property):
    """Nothing is lost or mixed up, and the memory stays level."""
    done = run_python(
        "-m", "tests.serve.soak", "--seconds=60", "--clients=64", timeout=550, real=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["mixed"], found["tracebacks"]) == (0, 0, 0), found
    assert found["equal"] + found["rounded"] == found["sent"] > 200
    assert found["left"] > 10
    assert found["rounded"] <= 0.05 * found["sent"]
    server = found["server"]
    assert server["done"] + server["cancelled"] <= found["sent"]
    assert (server["failed"], server["refused"]) == (0, 0)
    before, after = found["megabytes"]
    assert after - before < 32, found
    record_property(
        "survived",
        f"{found['sent']} requests, {found['left']} left by their clients, 0 lost, 0 mixed, "
        f"{found['rounded']} other than alone by rounding, memory {before} to {after} MB",
    )
