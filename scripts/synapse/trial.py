#!/usr/bin/env python3
"""Runs fsbus_handover.py in the real Synapse of a lab, before a stub that speaks the hand-over and delivers nothing.

    trial.py /path/to/lab

The lab is a copy of shared/lab whose up.sh can run; both homeservers must be stopped. Root is needed for the chroot.
"""

import http.server
import json
import os
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from typing import Any, Dict, List, Optional

YAML = """\
instance_map: {fsbus: {path: /srv/hs1/handover.sock}}
worker_replication_secret: lab-secret
modules: [{module: fsbus_handover.Fsbus, config: {}}]
"""


class Stub:
    """fsbus for the trial. mode: 200, refuse, or the code that it answers."""

    def __init__(self, path: str) -> None:
        self.path, self.mode = path, "200"
        self.sets: Dict[str, List[str]] = {}
        self.taken: List[Dict[str, Any]] = []
        self.seen: List[int] = []  # the codes of its answers to POST
        self.gets = 0
        self.lock = threading.Lock()
        self.server: Optional[socketserver.BaseServer] = None

    def answer(self, method: str, headers: Any, body: bytes) -> "tuple[int, Any]":
        if headers.get("Authorization") != "Bearer lab-secret":
            return 407, {}
        with self.lock:
            if self.mode.isdigit() and self.mode != "200":
                return int(self.mode), {}
            if method == "GET":
                self.gets += 1
                return 200, {"version": 1, "fsbus": "stub", "max_bytes": 4 << 20, "max_items": 1000, "max_sets": 1000}
            request = json.loads(body)
            known = dict(self.sets, **{s["id"]: s["servers"] for s in request["sets"]})
            unknown = sorted({i["to"] for i in request["items"]} - set(known))
            if unknown:
                return 409, {"errcode": "FSBUS_UNKNOWN_SETS", "unknown": unknown}
            self.sets = known
            if self.mode == "refuse":
                return 200, {"refused": {s: "full" for i in request["items"] for s in known[i["to"]]}}
            self.taken += request["items"]
            return 200, {}

    def up(self) -> None:
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def address_string(self) -> str:
                return "unix"

            def log_message(self, *_: Any) -> None:
                pass

            def reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, out = stub.answer(self.command, self.headers, body)
                if self.command == "POST":
                    stub.seen.append(code)
                data = json.dumps(out).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if stub.server is None:
                    self.close_connection = True
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = reply

            def handle(self) -> None:
                stub.connections.append(self.connection)
                super().handle()

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass

        if os.path.exists(self.path):
            os.unlink(self.path)
        self.connections: List[Any] = []
        self.server = Server(self.path, Handler)
        os.chmod(self.path, 0o666)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def down(self) -> None:
        assert self.server
        self.server.shutdown()
        self.server.server_close()
        os.unlink(self.path)
        for c in self.connections:
            try:
                c.shutdown(2)
            except OSError:
                pass

    def events(self) -> List[str]:
        with self.lock:
            return [i["event_id"] for i in self.taken if "pdu" in i]

    def edus(self) -> List[str]:
        with self.lock:
            return [i["edu"]["edu_type"] for i in self.taken if "edu" in i]


def until(what: Any, seconds: float = 30) -> float:
    start = time.time()
    while not what():
        if time.time() - start > seconds:
            return -1
        time.sleep(0.02)
    return time.time() - start


class Trial:
    def __init__(self, lab: str) -> None:
        self.lab, self.failed, self.passed = lab, 0, 0
        sys.path.insert(0, lab)
        import mx
        self.mx = mx
        self.stub = Stub(os.path.join(lab, "sid/srv/hs1/handover.sock"))

    def says(self, case: str, good: bool, figures: str) -> None:
        self.passed, self.failed = self.passed + good, self.failed + (not good)
        print("%-6s %-34s %s" % ("ok" if good else "FAILED", case, figures), flush=True)

    def start(self) -> None:
        subprocess.run(["./up.sh"], cwd=self.lab, env=dict(os.environ, HS1_EXTRA="handover.yaml"), check=True,
                       stdout=subprocess.DEVNULL)

    def log(self) -> List[str]:
        with open(os.path.join(self.lab, "hs1/hs.log"), encoding="utf-8") as f:
            return f.read().splitlines()

    def wait_for_take_over(self, times: int) -> float:
        return until(lambda: sum("is handed over" in line for line in self.log()) >= times)

    def send(self, n: int, name: str) -> "tuple[List[str], float]":
        ids, longest = [], 0.0
        for i in range(n):
            t = time.time()
            ids.append(self.alice.send(self.room, "%s %d" % (name, i)))
            longest = max(longest, time.time() - t)
        return ids, longest

    def at_hs2(self, ids: List[str], seconds: float = 30) -> float:
        start = time.time()
        for e in ids:
            try:
                self.bob.wait(self.room, e, seconds)
            except TimeoutError:
                return -1
        return time.time() - start

    def taken(self, case: str, ids: List[str], longest: float, more: str = "", repeats: bool = False) -> None:
        """Says whether the stub has ids, in order, and once unless repeats."""
        t = until(lambda: set(ids) <= set(self.stub.events()))
        got = [e for e in self.stub.events() if e in set(ids)]
        first = list(dict.fromkeys(got))
        good = first == ids and (repeats or len(got) == len(ids))
        self.says(case, good, "%d of %d events, %d handed over again, after %.2f s; longest client wait %.0f ms%s"
                  % (len(first), len(ids), len(got) - len(first), t, longest * 1000, more))

    def run(self) -> None:
        with open(os.path.join(self.lab, "sid/srv/hs1/handover.yaml"), "w", encoding="utf-8") as f:
            f.write(YAML)
        here = os.path.dirname(os.path.abspath(__file__))
        shutil.copy(os.path.join(here, "fsbus_handover.py"), os.path.join(self.lab, "sid/usr/lib/python3/dist-packages"))
        open(os.path.join(self.lab, "sid/srv/hs1/hs.log"), "w").close()
        os.chmod(os.path.join(self.lab, "sid/srv/hs1/hs.log"), 0o666)
        self.stub.up()
        self.start()
        took = self.wait_for_take_over(1)
        self.says("takes over", took >= 0, "GET answered %d times" % self.stub.gets)
        self.alice = self.mx.HS("hs1", "alice%d" % time.time(), True)
        self.bob = self.mx.HS("hs2", "bob%d" % time.time())
        self.room = self.alice.create("trial")
        self.bob.join(self.room, self.alice.name)
        q = self.mx.q

        ids, longest = self.send(50, "take")
        self.taken("take all", ids, longest)

        # A key waits for a server that is down: the event that may need it goes the way of the key, hs2's does not.
        self.encrypted()

        self.alice.req("PUT", "/_matrix/client/v3/rooms/%s/typing/%s" % (q(self.room), q(self.alice.user)),
                       {"typing": True, "timeout": 20000})
        event = self.bob.send(self.room, "read me")
        self.alice.wait(self.room, event)
        self.alice.req("POST", "/_matrix/client/v3/rooms/%s/receipt/m.read/%s" % (q(self.room), q(event)), {})
        self.alice.req("PUT", "/_matrix/client/v3/presence/%s/status" % q(self.alice.user),
                       {"presence": "online", "status_msg": "here"})
        want = {"m.typing", "m.receipt", "m.presence"}
        t = until(lambda: want <= set(self.stub.edus()))
        self.says("typing, receipt, presence", t >= 0, "%s after %.2f s" % (sorted(set(self.stub.edus())), t))

        self.stub.mode = "refuse"
        ids, longest = self.send(5, "refuse")
        t = self.at_hs2(ids)
        self.says("refuse all", t >= 0, "%d events at hs2 after %.2f s" % (len(ids), t))
        self.stub.mode = "200"
        time.sleep(1)  # Synapse's own queue ends

        self.stub.down()
        start = time.time()
        ids, longest = self.send(20, "away")
        time.sleep(max(0.0, 4 - (time.time() - start)))
        self.stub.up()
        self.taken("away 4 s", ids, longest, "; " + self.retries())

        self.stub.mode = "500"
        before = len(self.stub.seen)
        ids, longest = self.send(20, "500")
        until(lambda: 500 in self.stub.seen[before:])
        self.stub.mode = "200"
        self.taken("500 then 200", ids, longest, "; " + self.retries())

        self.stub.sets = {}
        before = len(self.stub.seen)
        ids, longest = self.send(5, "409")
        self.taken("409, sets forgotten", ids, longest)
        self.says("409 was answered", 409 in self.stub.seen[before:], str(self.stub.seen[before:]))

        ids = []
        for i in range(3):
            self.stub.down()
            more, longest = self.send(10, "kill %d" % i)
            ids += more
            pid = os.path.join(self.lab, "run/hs1.pid")
            with open(pid, encoding="utf-8") as f:
                os.kill(int(f.read()), signal.SIGKILL)
            os.unlink(pid)  # up.sh takes a process that nobody waits for as running
            self.stub.up()
            time.sleep(0.5)
            self.start()
            self.wait_for_take_over(i + 2)
        # Each start hands over from the position in the database; an event at hand when it ended comes again.
        self.taken("kill -9 of Synapse, 3 times", ids, longest, repeats=True)

        self.stub.mode = "404"
        before = len(self.stub.seen)
        ids, longest = self.send(5, "404")
        t = self.at_hs2(ids)
        self.says("404", t >= 0 and self.stub.seen[before:].count(404) <= 2,
                  "%d events at hs2 after %.2f s; %d requests" % (len(ids), t, len(self.stub.seen) - before))

        lines = [line for line in self.log() if "fsbus" in line and ("WARNING" in line or "ERROR" in line)]
        trace = [line for line in self.log() if line.startswith("Traceback")]
        self.says("the log", not any("ERROR" in line for line in lines),
                  "%d warnings of the module, %d tracebacks of anything" % (len(lines), len(trace)))
        for line in lines:
            print("       " + line[:200])

    def encrypted(self) -> None:
        content = {"algorithm": "m.megolm.v1.aes-sha2", "ciphertext": "x", "session_id": "s"}
        path = "/_matrix/client/v3/rooms/%s/send/m.room.encrypted/%d" % (self.mx.q(self.room), time.time_ns())
        plain = self.alice.req("PUT", path, content)["event_id"]
        t = until(lambda: plain in self.stub.events(), 10)
        self.says("encrypted, no key waits", t >= 0, "handed over after %.2f s" % t)

        subprocess.run(["./down.sh", "hs2"], cwd=self.lab, check=True)
        self.alice.req("PUT", "/_matrix/client/v3/sendToDevice/m.room.encrypted/%d" % time.time_ns(),
                       {"messages": {self.bob.user: {"*": content}}})
        time.sleep(3)  # Synapse's attempt fails; the key stays in its database
        event = self.alice.req("PUT", path + "1", content)["event_id"]
        time.sleep(1)
        overtook = event in self.stub.events()
        start = time.time()
        self.start()
        t = self.at_hs2([event], 60)
        self.says("encrypted, a key waits", not overtook and t >= 0,
                  "not handed over; at hs2 %.1f s after it is back" % (time.time() - start))

    def retries(self) -> str:
        d = self.alice.req("GET", "/_synapse/admin/v1/federation/destinations")["destinations"]
        down = [x["destination"] for x in d if x.get("retry_last_ts")]
        return "servers that Synapse holds for down: %d" % len(down)


def main() -> int:
    if len(sys.argv) != 2:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    lab = os.path.abspath(sys.argv[1])
    trial = Trial(lab)
    try:
        trial.run()
    finally:
        subprocess.run(["./down.sh"], cwd=lab, check=False)
    print("%d passed, %d failed" % (trial.passed, trial.failed))
    return int(trial.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
