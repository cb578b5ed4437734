#!/usr/bin/env bash
# huggingface_hub 2.4.0 with hf-xet 1.8.0: a download that is killed (SIGKILL) and started again by
# the same command begins at byte 0, although the server offers ranges and the bytes that came are
# still on the disk. The name of the `.incomplete` file has a random part, so that the second call
# cannot find it. For files of gigabytes on machines that are taken back, that is every byte twice.
#
# A server on the loopback interface sends one file of 32 MiB, slowed down. Seen on Python 3.11:
#   first call killed, bytes left on disk: more than 4 MiB; second call: Range None, 33554432 bytes
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet huggingface_hub==2.4.0 hf-xet==1.8.0
cat > server.py <<'PY'
import http.server, json, os, time

SIZE, COMMIT = 32 << 20, "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        if "/resolve/" not in self.path:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", '"' + "e" * 40 + '"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(SIZE - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{SIZE - 1}/{SIZE}")
        self.end_headers()
        if not body:
            return
        sent, began = 0, time.time()
        try:
            while sent < SIZE - first:
                self.wfile.write(bytes(1 << 18))
                sent += 1 << 18
                time.sleep(0.01)
        except OSError:
            pass
        with open("requests.jsonl", "a") as log:
            print(json.dumps({"range": asked, "sent": sent, "began": began}), file=log)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
with open("port.tmp", "w") as file:
    file.write(str(server.server_port))
os.replace("port.tmp", "port")
server.serve_forever()
PY
mkdir home
timeout 180 venv/bin/python server.py &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
for _ in $(seq 100); do [ -s port ] && break; sleep 0.1; done
export HF_ENDPOINT="http://127.0.0.1:$(cat port)" HF_HOME="$work/home" HF_HUB_DISABLE_PROGRESS_BARS=1
get="from huggingface_hub import hf_hub_download as get; get('owner/name', 'a.bin', repo_type='dataset')"
venv/bin/python -c "$get" &
client=$!
for _ in $(seq 200); do
  left=$(find home -name '*.incomplete' -printf '%s\n' 2>/dev/null | sort -n | tail -n 1)
  [ "${left:-0}" -gt $((4 << 20)) ] && break
  sleep 0.1
done
kill -9 "$client"
wait "$client" 2>/dev/null || true
left=$(find home -name '*.incomplete' -printf '%s\n' | sort -n | tail -n 1)
sleep 1
killed=$(date +%s.%N)
timeout 100 venv/bin/python -c "$get"
sleep 1
venv/bin/python - "$left" "$killed" <<'PY'
import json, sys

left, killed = int(sys.argv[1]), float(sys.argv[2])
requests = [json.loads(line) for line in open("requests.jsonl")]
second = [(r["range"], r["sent"]) for r in requests if r["began"] > killed]
print(f"bytes left by the killed call: {left}; (range, bytes) of the second call: {second}")
sys.exit(0 if left > 4 << 20 and second == [(None, 32 << 20)] else 1)
PY
echo "as described: the second call fetched all bytes again"
