import re
import subprocess

import pytest

from gpt2.kernels import cuda_driver


@pytest.mark.gpu
def test_the_version_is_the_one_that_nvidia_smi_prints():
    shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=True).stdout
    major, minor = re.search(r"CUDA Version: (\d+)\.(\d+)", shown).groups()
    assert cuda_driver.driver_version() == 1000 * int(major) + 10 * int(minor)


def test_a_driver_is_asked_for_its_version(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(version):
            version._obj.value = 12030

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", lambda _: Driver)
    assert cuda_driver.driver_version() == 12030


def test_without_a_driver_it_is_zero(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(cuda_driver.ctypes, "CDLL", missing)
    assert cuda_driver.driver_version() == 0
