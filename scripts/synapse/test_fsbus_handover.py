"""Tests of fsbus_handover.py on plain Python: Synapse, Twisted, the clock and the bus are fakes."""

import inspect
import json
import logging
import os
import sqlite3
import sys
import tempfile
import types
import unittest
from typing import Any, Dict, List, Optional

import check_versions
import fsbus_handover as fh



class Said(logging.Handler):
    """The lines of the module's log."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: List[str] = []

    def emit(self, record):
        self.lines.append("%s %s" % (record.levelname, record.getMessage()))

    def warnings(self):
        return [line for line in self.lines if not line.startswith(("INFO", "DEBUG"))]


said = Said()
fh.logger.addHandler(said)
fh.logger.propagate = False


class Deferred:
    """A value that comes later."""

    def __init__(self) -> None:
        self.fired, self.waiters = False, []

    def callback(self, _):
        self.fired = True
        for w in self.waiters:
            w()

    def __await__(self):
        if not self.fired:
            yield self


class Task:
    """Runs a coroutine as far as it goes."""

    def __init__(self, coroutine) -> None:
        self.coroutine, self.done, self.error, self.result = coroutine, False, None, None
        self.step()

    def step(self) -> None:
        try:
            self.coroutine.send(None).waiters.append(self.step)
        except StopIteration as e:
            self.done, self.result = True, e.value
        except Exception as e:
            self.done, self.error = True, e


class Reactor:
    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def callLater(self, seconds, f, *args):
        self.calls.append((self.now + seconds, len(self.calls), f, args))

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            due = sorted((c for c in self.calls if c[0] <= end + 1e-9), key=lambda c: c[:2])
            if not due:
                break
            self.calls.remove(due[0])
            self.now = due[0][0]
            due[0][2](*due[0][3])
        self.now = end

    def time_msec(self) -> int:
        return 1_000_000 + round(self.now * 1000)


class HttpResponseException(Exception):
    def __init__(self, code: int, body: Any = None) -> None:
        super().__init__(str(code))
        self.code, self.response = code, json.dumps(body or {}).encode()


class Stub:
    """A bus. answers: what it says next, a code or a body or an exception; then it takes what comes."""

    def __init__(self) -> None:
        self.answers: List[Any] = []
        self.gets, self.posts, self.taken = [], [], []
        self.sets: Dict[str, List[str]] = {}
        self.hello: Any = {"version": 1, "fsbus": "t", "max_bytes": 4 << 20, "max_items": 1000, "max_sets": 1000}
        self.always: Any = None
        self.hold: Optional[Deferred] = None
        self.in_flight = self.most_in_flight = 0

    async def get_json(self, uri, args=None, headers=None):
        self.gets.append(args)
        if isinstance(self.hello, Exception):
            raise self.hello
        return self.hello

    async def post_json_get_json(self, uri, post_json, headers=None):
        body = json.loads(json.dumps(post_json))
        self.posts.append((uri, body, headers))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.hold:
            await self.hold
        self.in_flight -= 1
        answer = self.answers.pop(0) if self.answers else self.always
        if isinstance(answer, Exception):
            raise answer
        known = dict(self.sets, **{s["id"]: s["servers"] for s in body["sets"]})
        unknown = sorted({i["to"] for i in body["items"]} - set(known))
        if unknown:
            raise HttpResponseException(409, {"errcode": "FSBUS_UNKNOWN_SETS", "unknown": unknown})
        if callable(answer):
            answer = answer(body, known)
        self.sets = known
        for n, i in enumerate(body["items"]):
            to = set(known[i["to"]]) - set((answer or {}).get("refused", {}))
            if str(n) not in (answer or {}).get("refused_items", {}):
                self.taken.append((i.get("event_id") or i["edu"]["edu_type"], sorted(to), i))
        return answer or {}


class Queue:
    def __init__(self, running=False, pdus=(), new=False) -> None:
        self.transmission_loop_running, self._pending_pdus, self._new_data_to_send = running, list(pdus), new


class Edu:
    def __init__(self, origin, destination, edu_type, content) -> None:
        self.origin, self.destination, self.edu_type, self.content = origin, destination, edu_type, content


class Counter:
    def __init__(self, labels=()) -> None:
        self._labelnames, self.n = labels, 0

    def labels(self, **kw):
        assert set(kw) == set(self._labelnames)
        c = self
        return types.SimpleNamespace(inc=lambda n=1: Counter.inc(c, n), _labelnames=())

    def inc(self, n=1):
        self.n += n


class World:
    """A Synapse of a version, as far as the module sees it."""

    def __init__(self, version=(1, 160), **change) -> None:
        said.lines.clear()
        self.reactor, self.stub = Reactor(), Stub()
        if "hello" in change:
            self.stub.hello = change["hello"]
        self.own: List[tuple] = []  # what went Synapse's own way
        self.marks: Dict[str, Optional[int]] = {}
        self.keys: set = set()
        self.poked: List[int] = []
        self.queries = 0
        self.hosts = {"a.org", "b.org", "hs"}
        self.tasks: List[Task] = []
        self.modules = self._modules(version, change)
        for k, v in self.modules.items():
            sys.modules[k] = v
        self.hs = self._hs(version, change)
        run = lambda desc, f, *a: self.tasks.append(Task(f(*a)))
        self.api = types.SimpleNamespace(_hs=self.hs)
        if version >= (1, 136):
            self.api.run_as_background_process = run
        else:
            m = types.ModuleType("synapse.metrics.background_process_metrics")
            m.run_as_background_process = run
            sys.modules[m.__name__] = self.modules[m.__name__] = m
        self.before = dict(vars(self.sender))
        self.module = fh.Fsbus(fh.Fsbus.parse_config(change.get("config", {})), self.api)

    def close(self) -> None:
        for k in self.modules:
            sys.modules.pop(k, None)

    def _modules(self, version, change) -> Dict[str, types.ModuleType]:
        world = self

        class FederationSender:
            async def _send_pdu(self, pdu, destinations):
                world.own.append(("pdu", pdu.event_id, sorted(destinations)))

            async def send_read_receipt(self, receipt):
                world.own.append(("receipt", receipt.user_id))

            def notify_new_events(self, max_token):
                world.poked.append(max_token)

            def send_edu(self, edu, key):
                world.own.append((edu.edu_type, edu.destination, edu.content))

        if version >= (1, 92):
            async def presence(self, states, destinations):
                world.own.append(("presence", [s.user_id for s in states], sorted(destinations)))
        else:
            def presence(self, states, destinations):
                world.own.append(("presence", [s.user_id for s in states], sorted(destinations)))
        FederationSender.send_presence_to_destinations = presence
        for name, f in change.get("sender", {}).items():
            setattr(FederationSender, name, f)

        class BaseHttpClient:
            async def get_json(self, uri, args=None, headers=None): ...
            async def post_json_get_json(self, uri, post_json, headers=None): ...

        class TransactionWorkerStore:
            async def get_destination_last_successful_stream_ordering(self, destination):
                return world.marks.get(destination)

            def get_room_max_token(self):
                return 7

            async def set_destination_last_successful_stream_ordering(self, destination,
                                                                      last_successful_stream_ordering):
                world.marks[destination] = last_successful_stream_ordering

        def format_user_presence_state(state, now, include_user_id=True):
            return {"user_id": state.user_id, "presence": state.state}

        def make_deferred_yieldable(deferred):
            return deferred

        def serialize_and_filter_pdus(pdus, time_now=None):
            return [p.get_pdu_json(time_now) for p in pdus if p.valid]

        labels = ("server_name",) if version >= (1, 136) else ()
        self.total, self.count = Counter(labels), Counter(labels)
        self.cls, self.store_cls = FederationSender, TransactionWorkerStore
        content = {
            "synapse": {}, "synapse.util": {"SYNAPSE_VERSION": "%d.%d.0" % version[:2]},
            "synapse.federation.sender": {"FederationSender": FederationSender,
                                          "sent_pdus_destination_dist_total": self.total,
                                          "sent_pdus_destination_dist_count": self.count},
            "synapse.federation.units": {"Edu": Edu},
            "synapse.handlers.presence": {"format_user_presence_state": format_user_presence_state},
            "synapse.http.client": {"BaseHttpClient": BaseHttpClient},
            "synapse.logging.context": {"make_deferred_yieldable": make_deferred_yieldable},
            "synapse.api.errors": {"HttpResponseException": HttpResponseException},
            "synapse.storage.databases.main.transactions": {"TransactionWorkerStore": TransactionWorkerStore},
            "twisted": {}, "twisted.internet": {}, "twisted.internet.defer": {"Deferred": Deferred},
        }
        if version >= (1, 127, 1):
            content["synapse.federation.units"]["serialize_and_filter_pdus"] = serialize_and_filter_pdus
        out = {}
        for name, members in content.items():
            parts = name.split(".")
            for i in range(1, len(parts) + 1):
                p = ".".join(parts[:i])
                out.setdefault(p, types.ModuleType(p))
            vars(out[name]).update(members)
        return out

    def _hs(self, version, change):
        world = self

        class Pool:
            async def runInteraction(self, desc, f):
                world.queries += 1
                db = sqlite3.connect(":memory:")
                db.execute("CREATE TABLE device_federation_outbox (destination TEXT)")
                db.executemany("INSERT INTO device_federation_outbox VALUES (?)", [(k,) for k in world.keys] * 2)
                try:
                    return f(db.cursor())
                finally:
                    db.close()

        async def hosts(room):
            return set(world.hosts)

        sender = self.sender = self.cls()
        sender.server_name, sender._instance_name = "hs", "master"
        sender.store = self.store_cls()
        sender.store.db_pool = Pool()
        sender.is_mine_id = lambda u: u.endswith(":hs")
        sender._per_destination_queues = {}
        sender._federation_shard_config = types.SimpleNamespace(should_handle=lambda i, d: d != "shard.org")
        sender._storage_controllers = types.SimpleNamespace(state=types.SimpleNamespace(
            get_current_hosts_in_room_or_partial_state_approximation=hosts))
        self.callbacks = types.SimpleNamespace()
        if version >= (1, 158):
            self.callbacks.interested_in_events_delivered_over_federation = lambda: False
        sender._transaction_manager = types.SimpleNamespace(_federation_callbacks=self.callbacks)
        if version >= (1, 140):
            sender._is_shutdown = False
        federation = types.SimpleNamespace(federation_domain_whitelist=change.get("whitelist"))
        if version >= (1, 91):
            federation.is_domain_allowed_according_to_federation_whitelist = (
                lambda d: change.get("whitelist") is None or d in change["whitelist"])
        config = types.SimpleNamespace(
            federation=federation, server=types.SimpleNamespace(track_presence=change.get("track_presence", True)),
            worker=types.SimpleNamespace(instance_map=change.get("instance_map", {"fsbus": 1}),
                                         worker_replication_secret="s3"))
        return types.SimpleNamespace(
            config=config, should_send_federation=lambda: change.get("sends", True),
            get_federation_sender=lambda: sender, get_replication_client=lambda: self.stub,
            get_reactor=lambda: self.reactor, get_clock=lambda: self.reactor)

    # What a test does.

    def pdu(self, event_id="$1", to=("a.org", "b.org"), type="m.room.message", valid=True) -> Task:
        body = {"type": type, "content": {"body": event_id}}
        p = types.SimpleNamespace(event_id=event_id, room_id="!r", type=type, valid=valid,
                                  internal_metadata=types.SimpleNamespace(stream_ordering=7),
                                  get_pdu_json=lambda now: body)
        return Task(self.sender._send_pdu(p, iter(to)))

    def presence(self, user, state, to):
        s = Presence(user, state)
        r = self.sender.send_presence_to_destinations([s], list(to))
        if inspect.isawaitable(r):
            Task(r)

    def typing(self, user, on, to):
        for d in to:
            self.sender.send_edu(Edu("hs", d, "m.typing", {"room_id": "!r", "user_id": user, "typing": on}), (user,))

    def receipt(self, user, event) -> Task:
        return Task(self.sender.send_read_receipt(types.SimpleNamespace(
            room_id="!r", receipt_type="m.read", user_id=user, event_ids=[event], thread_id=None, data={"ts": 1})))

    def taken(self):
        return [(what, to) for what, to, _ in self.stub.taken]


class Presence:
    def __init__(self, user_id, state) -> None:
        self.user_id, self.state, self.status_msg = user_id, state, None

    def __eq__(self, other):
        return (self.user_id, self.state) == (other.user_id, other.state)


class Case(unittest.TestCase):
    def world(self, *args, **change) -> World:
        w = World(*args, **change)
        self.addCleanup(w.close)
        return w

    def patched(self, w: World) -> bool:
        return vars(w.sender) != w.before


class TakesOver(Case):
    VERSIONS = [(1, 89), (1, 91), (1, 92), (1, 121), (1, 127, 1), (1, 132), (1, 136), (1, 140), (1, 144), (1, 158),
                (1, 160)]

    def test_versions(self):
        for v in self.VERSIONS:
            with self.subTest(version=v):
                w = self.world(v)
                self.assertTrue(self.patched(w))
                self.assertEqual(w.stub.gets[0]["synapse"], "%d.%d.0" % v[:2])
                self.assertEqual(len(w.stub.gets[0]["module"]), 64)
                for name in ("_send_pdu", "send_read_receipt", "send_edu", "send_presence_to_destinations"):
                    mine, own = getattr(w.sender, name), getattr(w.cls, name)
                    self.assertEqual(inspect.iscoroutinefunction(mine), inspect.iscoroutinefunction(own))
                self.assertTrue(w.pdu().done)
                w.presence("@u:hs", "online", ["a.org"])
                w.reactor.advance(0.05)
                self.assertEqual(w.taken(), [("$1", ["a.org", "b.org"]), ("m.presence", ["a.org"])])
                self.assertEqual((w.total.n, w.count.n), (2, 1))
                w.close()

    def test_what_was_under_way_is_sent(self):
        self.assertEqual(self.world().poked, [7])
        def changed(self): ...
        w = self.world(sender={"notify_new_events": changed})
        w.pdu()
        self.assertEqual(w.taken(), [("$1", ["a.org", "b.org"])])

    def test_unknown(self):
        async def more(self, pdu, destinations, extra): ...
        def sync(self, pdu, destinations): ...
        async def asynchronous(self, edu, key): ...
        for why, change in {
            "a parameter more": {"sender": {"_send_pdu": more}},
            "no coroutine function": {"sender": {"_send_pdu": sync}},
            "a coroutine function": {"sender": {"send_edu": asynchronous}},
            "no method": {"sender": {"send_read_receipt": None}},
            "no instance": {"instance_map": {}},
            "a worker that sends nothing": {"sends": False},
        }.items():
            with self.subTest(why):
                w = self.world(**change)
                self.assertFalse(self.patched(w))
                self.assertEqual(w.stub.gets, [])
                self.assertEqual(len(said.warnings()), int("sends" not in change))
                w.close()

    def test_never_raises_at_load(self):
        for api in (types.SimpleNamespace(), types.SimpleNamespace(_hs=None)):
            fh.Fsbus({"instance": "fsbus"}, api)
        w = self.world()
        del sys.modules["synapse.http.client"]
        fh.Fsbus({"instance": "fsbus"}, w.api)

    def test_bus_refuses_at_start(self):
        for hello in (HttpResponseException(404), HttpResponseException(400, {"errcode": "FSBUS_VERSION"}),
                      HttpResponseException(407), HttpResponseException(403), {"version": 2}, []):
            with self.subTest(hello=hello):
                w = self.world(hello=hello)
                w.reactor.advance(60)
                self.assertFalse(self.patched(w))
                self.assertEqual(len(w.stub.gets), 1)
                self.assertEqual(len(said.warnings()), 1)

    def test_away_at_start(self):
        w = self.world(hello=OSError())
        w.reactor.advance(20)
        self.assertFalse(self.patched(w))
        w.pdu()
        self.assertEqual(w.own, [("pdu", "$1", ["a.org", "b.org"])])
        w.stub.hello = {"version": 1}
        w.reactor.advance(5)
        self.assertTrue(self.patched(w))


class Events(Case):
    def test_wire(self):
        w = self.world()
        w.pdu(to=["b.org", "a.org", "hs", "shard.org"])
        uri, body, headers = w.stub.posts[0]
        self.assertEqual(uri, "synapse-replication://fsbus/_fsbus/v1/handover")
        self.assertEqual(headers, {b"Authorization": [b"Bearer s3"]})
        sid = fh.set_id(["a.org", "b.org"])
        self.assertEqual(sid, "0989bba53f56809bf160234cff678841")  # printf 'a.org\nb.org\n' | sha256sum
        self.assertEqual(body["sets"], [{"id": sid, "servers": ["a.org", "b.org"]}])
        self.assertEqual(body["items"], [{"pdu": {"type": "m.room.message", "content": {"body": "$1"}},
                                          "event_id": "$1", "room_id": "!r", "to": sid}])
        self.assertEqual((body["version"], body["synapse"], len(body["module"])), (1, "1.160.0", 64))
        w.pdu("$2")
        self.assertEqual(w.stub.posts[1][1]["sets"], [])
        self.assertEqual(w.own, [])

    def test_away_then_back(self):
        for why in (OSError("refused"), HttpResponseException(500), HttpResponseException(429)):
            with self.subTest(why=why):
                w = self.world()
                w.stub.always = why
                t = w.pdu()
                w.reactor.advance(4)
                self.assertFalse(t.done)
                self.assertLess(len(w.stub.posts), 10)
                self.assertEqual(w.own, [])
                w.stub.always = None
                w.reactor.advance(5)
                self.assertTrue(t.done and t.error is None)
                self.assertEqual(w.taken(), [("$1", ["a.org", "b.org"])])
                self.assertGreater(len(w.stub.gets), 1)
                self.assertEqual(len(said.warnings()), 1)
                for i in range(10):
                    w.stub.answers = [why]
                    w.pdu("$a%d" % i)
                    w.reactor.advance(1)
                self.assertEqual(len(said.warnings()), 1)  # one a minute
                w.close()

    def test_off(self):
        for code, body in ((404, None), (400, {"errcode": "FSBUS_VERSION"}), (407, None), (403, None), (409, None)):
            with self.subTest(code=code):
                w = self.world()
                w.stub.answers = [HttpResponseException(code, body)]
                self.assertIsNone(w.pdu().error)
                w.pdu("$2")
                w.presence("@u:hs", "online", ["a.org"])
                w.receipt("@u:hs", "$1")
                w.typing("@u:hs", True, ["a.org"])
                w.reactor.advance(60)
                self.assertEqual(len(w.stub.posts), 1)
                self.assertEqual(len(said.warnings()), 1)
                self.assertEqual([o[0] for o in w.own], ["pdu", "pdu", "presence", "receipt", "m.typing"])
                w.close()

    def test_bus_has_forgotten_the_set(self):
        w = self.world()
        w.pdu()
        w.stub.sets = {}
        self.assertTrue(w.pdu("$2").done)
        self.assertEqual([len(p[1]["sets"]) for p in w.stub.posts], [1, 0, 1])
        self.assertEqual([t[0] for t in w.taken()], ["$1", "$2"])

    def test_too_large_is_split(self):
        w = self.world()
        w.stub.always = lambda body, known: self.limit(body, known, 2)
        names = ["s%d.org" % i for i in range(8)]
        self.assertTrue(w.pdu(to=names).done)
        self.assertEqual(sorted(n for _, to in w.taken() for n in to), names)
        self.assertEqual(w.own, [])
        w.stub.always = HttpResponseException(413)
        w.pdu("$2", to=["a.org"])
        self.assertEqual(w.own, [("pdu", "$2", ["a.org"])])

    @staticmethod
    def limit(body, known, n):
        if any(len(known[i["to"]]) > n for i in body["items"]):
            raise HttpResponseException(413)
        return {}

    def test_refused_server(self):
        w = self.world()
        w.marks["b.org"] = 3
        w.stub.always = {"refused": {"a.org": "full"}}
        w.pdu()
        self.assertEqual(w.own, [("pdu", "$1", ["a.org"])])
        self.assertEqual(w.marks, {"a.org": 6, "b.org": 3})
        self.assertEqual((w.total.n, w.count.n), (1, 0))  # Synapse's own way counts the rest

    def test_refused_item(self):
        w = self.world()
        w.marks["b.org"] = 3
        w.stub.always = {"refused_items": {"0": "too large"}}
        w.pdu()
        self.assertEqual(w.own, [("pdu", "$1", ["a.org", "b.org"])])
        self.assertEqual(w.marks, {"a.org": 6, "b.org": 3})

    def test_shutdown_while_waiting(self):
        w = self.world()
        w.stub.always = OSError()
        t = w.pdu()
        w.sender._is_shutdown = True
        w.reactor.advance(60)
        self.assertFalse(t.done)  # neither an error nor a return: the position stays
        self.assertEqual((w.own, w.reactor.calls), ([], []))

    def test_crash_repeats(self):
        w = self.world()
        w.stub.answers = [OSError("the answer is lost")]
        t = w.pdu()
        w.reactor.advance(1)
        self.assertTrue(t.done)
        first, second = (p[1]["items"] for p in w.stub.posts)
        self.assertEqual(first, second)

    def test_keys_before_messages(self):
        w = self.world()
        w.sender._per_destination_queues = {
            "running.org": Queue(running=True), "pdus.org": Queue(pdus=[1]), "new.org": Queue(new=True),
            "idle.org": Queue(), "other.org": types.SimpleNamespace()}
        w.keys = {"keys.org"}
        names = ["running.org", "pdus.org", "new.org", "idle.org", "keys.org", "other.org"]
        w.pdu(to=names)
        self.assertEqual(w.taken(), [("$1", ["idle.org", "keys.org"])])
        self.assertEqual(w.queries, 0)
        w.pdu("$2", to=names, type="m.room.encrypted")
        self.assertEqual(w.taken()[1:], [("$2", ["idle.org"])])
        self.assertEqual(w.queries, 1)
        self.assertEqual(w.own[1], ("pdu", "$2", ["keys.org", "new.org", "other.org", "pdus.org", "running.org"]))

    def test_keys_of_many_servers(self):
        w = self.world()
        names = ["s%04d.org" % i for i in range(fh.SQL_NAMES * 2 + 1)]
        w.keys = {names[0], names[-1], "elsewhere.org"}
        w.pdu(to=names, type="m.room.encrypted")
        self.assertEqual(w.own, [("pdu", "$1", [names[0], names[-1]])])
        self.assertEqual(w.taken(), [("$1", names[1:-1])])

    def test_whitelist(self):
        w = self.world(whitelist={"a.org"})
        w.pdu()
        self.assertEqual((w.taken(), w.own), ([("$1", ["a.org"])], []))

    def test_left_to_synapse(self):
        w = self.world()
        w.pdu(valid=False)
        w.callbacks.interested_in_events_delivered_over_federation = lambda: True
        w.pdu("$2")
        self.assertEqual([o[1] for o in w.own], ["$1", "$2"])
        self.assertEqual(w.stub.posts, [])

    def test_own_error_is_not_raised(self):
        w = self.world()
        w.sender._federation_shard_config.should_handle = None
        self.assertIsNone(w.pdu().error)
        self.assertEqual(w.own, [("pdu", "$1", ["a.org", "b.org"])])
        w.presence("@u:hs", "online", ["a.org"])
        w.typing("@u:hs", True, ["a.org"])
        w.receipt("@u:hs", "$1")
        self.assertEqual([o[0] for o in w.own[1:]], ["presence", "m.typing", "receipt"])

    def test_order(self):
        w = self.world()
        for i in range(20):
            self.assertTrue(w.pdu("$%d" % i).done)
        self.assertEqual([t[0] for t in w.taken()], ["$%d" % i for i in range(20)])

    def test_known_sets_are_bounded(self):
        w = self.world()
        for i in range(fh.MAX_KNOWN_SETS + 5):
            w.pdu("$%d" % i, to=["s%d.org" % i])
        self.assertEqual(len(w.module._bus._sets), fh.MAX_KNOWN_SETS)

    def test_marked_is_bounded(self):
        w = self.world()
        w.stub.always = {"refused_items": {"0": "x"}}
        w.pdu(to=["s%d.org" % i for i in range(fh.MAX_MARKED + 5)])
        self.assertEqual(len(w.module._marked), fh.MAX_MARKED)

    def test_requests_keep_to_max_bytes(self):
        w = self.world()
        w.module._bus.max_bytes = 4096
        names = ["server-number-%d.example.org" % i for i in range(300)]
        self.assertTrue(w.pdu(to=names).done)
        self.assertEqual(sorted(n for _, to in w.taken() for n in to), sorted(names))
        self.assertGreater(len(w.stub.posts), 3)
        for p in w.stub.posts:
            self.assertLessEqual(fh.json_size(p[1]), 4096)


class Volatile(Case):
    def test_merged(self):
        w = self.world()
        w.presence("@u:hs", "online", ["a.org", "b.org"])
        w.presence("@u:hs", "online", ["c.org"])
        w.presence("@v:hs", "online", ["a.org", "b.org", "c.org"])
        w.typing("@u:hs", True, ["a.org", "b.org"])
        w.receipt("@u:hs", "$1")
        w.receipt("@u:hs", "$2")
        w.reactor.advance(0.049)
        self.assertEqual(w.stub.posts, [])
        w.reactor.advance(0.002)
        self.assertEqual(len(w.stub.posts), 1)
        self.assertEqual(w.taken(), [("m.presence", ["a.org", "b.org", "c.org"]),
                                     ("m.presence", ["a.org", "b.org", "c.org"]),
                                     ("m.typing", ["a.org", "b.org"]), ("m.receipt", ["a.org", "b.org"])])
        self.assertEqual(len(w.stub.posts[0][1]["sets"]), 2)
        self.assertEqual(w.stub.taken[3][2]["edu"]["content"]["!r"]["m.read"]["@u:hs"]["event_ids"], ["$2"])

    def test_latest_wins_server_by_server(self):
        w = self.world()
        w.presence("@u:hs", "online", ["a.org", "b.org"])
        w.presence("@u:hs", "offline", ["a.org"])
        w.reactor.advance(0.1)
        got = [(i["edu"]["content"]["push"][0]["presence"], to) for _, to, i in w.stub.taken]
        self.assertEqual(got, [("online", ["b.org"]), ("offline", ["a.org"])])

    def test_one_in_flight(self):
        w = self.world()
        w.stub.hold = Deferred()
        w.presence("@u:hs", "online", ["a.org"])
        w.reactor.advance(0.1)
        w.presence("@v:hs", "online", ["a.org"])
        w.reactor.advance(1)
        self.assertEqual(len(w.stub.posts), 1)
        w.stub.hold.callback(None)
        w.reactor.advance(0.1)
        self.assertEqual((len(w.stub.posts), w.stub.most_in_flight), (2, 1))

    def test_away_keeps_the_latest(self):
        w = self.world()
        w.stub.always = OSError()
        w.presence("@u:hs", "online", ["a.org", "b.org"])
        w.typing("@u:hs", True, ["a.org"])
        w.reactor.advance(1)
        w.presence("@u:hs", "offline", ["a.org"])
        w.reactor.advance(40)
        w.stub.always = None
        w.reactor.advance(6)
        got = [(i["edu"]["content"]["push"][0]["presence"], to) for _, to, i in w.stub.taken]
        self.assertEqual(got, [("online", ["b.org"]), ("offline", ["a.org"])])  # the typing notice is too old
        self.assertEqual(w.own, [])

    def test_refused(self):
        w = self.world()
        w.stub.always = {"refused": {"a.org": "full"}, "refused_items": {"2": "malformed"}}
        w.presence("@u:hs", "online", ["a.org", "b.org"])
        w.typing("@u:hs", True, ["a.org"])
        w.receipt("@u:hs", "$1")
        w.reactor.advance(0.1)
        self.assertEqual([o[:2] if o[0] != "presence" else o for o in w.own],
                         [("presence", ["@u:hs"], ["a.org"]), ("m.typing", "a.org"),
                          ("m.receipt", "a.org"), ("m.receipt", "b.org")])

    def test_off_with_some_waiting(self):
        w = self.world()
        w.stub.always = HttpResponseException(404)
        w.presence("@u:hs", "online", ["a.org"])
        w.reactor.advance(1)
        self.assertEqual(w.own, [("presence", ["@u:hs"], ["a.org"])])

    def test_left_to_synapse(self):
        w = self.world(track_presence=False)
        w.presence("@u:hs", "online", ["a.org"])
        w.sender.send_edu(Edu("hs", "a.org", "m.other", {}), None)
        self.assertEqual([o[0] for o in w.own], ["presence", "m.other"])
        w = self.world()
        w.presence("@u:elsewhere", "online", ["a.org"])
        self.assertEqual([o[0] for o in w.own], ["presence"])

    def test_bounds(self):
        for name, limits, each in (("entries", (3, 1000, 1000), 1), ("pairs", (100, 6, 1000), 2),
                                   ("bytes", (100, 1000, 30), 1)):
            with self.subTest(name):
                g = fh.Gathered(*limits)
                for i in range(5):
                    g.put(fh.Entry(("k", i), i, {"s%d" % j for j in range(each)}, 10, 0))
                self.assertEqual((g.entries, g.pairs, g.bytes, g.dropped), (3, 3 * each, 30, 2))
                self.assertEqual([e.key[1] for e in g.take(10)], [2, 3, 4])
                self.assertEqual((g.entries, g.pairs, g.bytes), (0, 0, 0))

    def test_put_back(self):
        g = fh.Gathered()
        g.put(fh.Entry(("k",), 1, {"a", "b"}, 1, 0))
        g.put(fh.Entry(("l",), 1, {"a"}, 1, 0))
        out = g.take(1)
        g.put(fh.Entry(("k",), 2, {"a"}, 1, 0))
        g.put_back(out)
        self.assertEqual([(e.key[0], e.value, sorted(e.to)) for e in g.take(9)],
                         [("k", 1, ["b"]), ("k", 2, ["a"]), ("l", 1, ["a"])])
        self.assertEqual((g.entries, g.pairs, g.bytes), (0, 0, 0))


class Sources(unittest.TestCase):
    """check_versions.py before sources that are made from the module's own tables."""

    def write(self, folder: str, change: Dict[str, str]) -> None:
        files: Dict[str, Dict[str, List[str]]] = {}
        for module, cls, name, is_async, params in fh.KNOWN + fh.KNOWN_IF_THERE:
            line = "%sdef %s(%s): ..." % ("async " if is_async else "", name, ", ".join(params))
            line = change.get(name, line)
            files.setdefault(module, {}).setdefault(cls, []).append(line)
        sets = "; ".join("self.%s = 1" % a for a in fh.ATTRIBUTES)
        files["synapse.federation.sender"]["FederationSender"].append("def __init__(self): " + sets)
        queue = change.get("queue", "; ".join("self.%s = 1" % a for a in check_versions.QUEUE))
        files["synapse.federation.sender.per_destination_queue"] = {
            "PerDestinationQueue": ["def __init__(self): " + queue]}
        for module, classes in files.items():
            path = os.path.join(folder, *module.split("."))
            path = os.path.join(path, "__init__.py") if module == "synapse.federation.sender" else path + ".py"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as f:
                for cls, lines in classes.items():
                    f.write("class %s:\n" % cls if cls else "")
                    f.write("".join(("    " if cls else "") + line + "\n" for line in lines))

    def test_sources(self):
        for change, why in (
            ({}, []),
            ({"serialize_and_filter_pdus": "pass"}, []),
            ({"_send_pdu": "async def _send_pdu(self, pdu): ..."},
             ["synapse.federation.sender.FederationSender._send_pdu(self, pdu)"]),
            ({"send_edu": "async def send_edu(self, edu, key): ..."},
             ["synapse.federation.sender.FederationSender.send_edu is async"]),
            ({"make_deferred_yieldable": "pass"}, ["there is no synapse.logging.context.make_deferred_yieldable"]),
            ({"queue": "self.other = 1"}, ["PerDestinationQueue has no %s" % a for a in check_versions.QUEUE]),
        ):
            with self.subTest(change=change), tempfile.TemporaryDirectory() as folder:
                self.write(folder, change)
                got = check_versions.unknown(os.path.join(folder, "synapse"))
                self.assertEqual(got, why)


if __name__ == "__main__":
    unittest.main()
