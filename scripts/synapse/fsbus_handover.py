"""A module for Synapse that hands what it sends to other servers over to fsbus, once.

Synapse makes a transaction for each server of a room. With this module it gives each event, receipt,
presence and typing notice to fsbus with the list of servers, and fsbus delivers. To-device messages,
device lists and catch-up stay Synapse's own.

homeserver.yaml:

    instance_map: {fsbus: {path: /run/fsbus/front.sock}}
    worker_replication_secret: "the secret of fsbus"
    modules: [{module: fsbus_handover.Fsbus, config: {}}]

The module changes nothing unless it knows every method that it needs (KNOWN) and fsbus has answered.
What fsbus refuses goes Synapse's own way. While fsbus is away, events wait and what is volatile is merged.
"""

import hashlib
import importlib
import inspect
import json
import logging
from collections import OrderedDict
from typing import (
    Any, Awaitable, Callable, Collection, Dict, FrozenSet, Hashable, Iterable, Iterator, List, Mapping, Optional,
    Sequence, Set, Tuple,
)

logger = logging.getLogger(__name__)

VERSION = 1  # of the wire format
PATH = "/_fsbus/v1/handover"

# What must be as it is here: module, class or "", name, whether it is a coroutine function (None: either), parameters.
# check_versions.py reads this table.
KNOWN: Tuple[Tuple[str, str, str, Optional[bool], Tuple[str, ...]], ...] = (
    ("synapse.federation.sender", "FederationSender", "_send_pdu", True, ("self", "pdu", "destinations")),
    ("synapse.federation.sender", "FederationSender", "send_read_receipt", True, ("self", "receipt")),
    ("synapse.federation.sender", "FederationSender", "send_presence_to_destinations", None,
     ("self", "states", "destinations")),
    ("synapse.federation.sender", "FederationSender", "send_edu", False, ("self", "edu", "key")),
    ("synapse.handlers.presence", "", "format_user_presence_state", False, ("state", "now", "include_user_id")),
    ("synapse.http.client", "BaseHttpClient", "get_json", True, ("self", "uri", "args", "headers")),
    ("synapse.http.client", "BaseHttpClient", "post_json_get_json", True, ("self", "uri", "post_json", "headers")),
    ("synapse.logging.context", "", "make_deferred_yieldable", False, ("deferred",)),
    ("synapse.storage.databases.main.transactions", "TransactionWorkerStore",
     "get_destination_last_successful_stream_ordering", True, ("self", "destination")),
    ("synapse.storage.databases.main.transactions", "TransactionWorkerStore",
     "set_destination_last_successful_stream_ordering", True,
     ("self", "destination", "last_successful_stream_ordering")),
)
# As KNOWN, where it exists: in older versions it does not.
KNOWN_IF_THERE: Tuple[Tuple[str, str, str, Optional[bool], Tuple[str, ...]], ...] = (
    ("synapse.federation.units", "", "serialize_and_filter_pdus", False, ("pdus", "time_now")),
)
# What the sender must have.
ATTRIBUTES: Tuple[str, ...] = (
    "server_name", "store", "is_mine_id", "_per_destination_queues", "_federation_shard_config", "_instance_name",
    "_storage_controllers", "_transaction_manager",
)

WINDOW = 0.05  # seconds in which volatile things gather
WAIT_MIN, WAIT_MAX = 0.1, 5.0  # seconds between two tries while the bus is away
TYPING_LIVES_MS = 30_000  # receivers forget it then
SAY_AGAIN_MS = 60_000  # between two warnings of one kind

MAX_ENTRIES = 5_000  # volatile payloads that wait
MAX_PAIRS = 200_000  # their destinations, added up
MAX_BYTES = 8 << 20  # their payloads, added up
MAX_SET = 50_000  # servers in a set
MAX_KNOWN_SETS = 1_000  # set names of which we believe that the bus knows them
MAX_MARKED = 20_000  # servers of which we know that their last successful position is set
SQL_NAMES = 500  # names in one query; SQLite before 3.32 takes 999


class Away(Exception):
    """The bus does not answer, or says that it cannot now: wait and try again."""


class Off(Exception):
    """The bus does not hand over with us: Synapse sends by itself until its next start."""


class Item:
    """One payload and the servers that get it."""

    __slots__ = ("payload", "size", "to")

    def __init__(self, payload: Dict[str, Any], to: FrozenSet[str], size: int = 0) -> None:
        self.payload, self.to = payload, to
        self.size = size or json_size(payload)


class Entry:
    """A volatile payload that waits. Entries of one key replace each other, server by server; equal values are one."""

    __slots__ = ("key", "value", "to", "size", "since")

    def __init__(self, key: Tuple[Any, ...], value: Any, to: Set[str], size: int, since: int) -> None:
        self.key, self.value, self.to, self.size, self.since = key, value, to, size, since


class Gathered:
    """Volatile payloads that wait, oldest first. Bounded; the oldest is dropped."""

    def __init__(self, entries: int = MAX_ENTRIES, pairs: int = MAX_PAIRS, size: int = MAX_BYTES) -> None:
        self._max = (entries, pairs, size)
        self._keys: "OrderedDict[Tuple[Any, ...], List[Entry]]" = OrderedDict()
        self.entries = self.pairs = self.bytes = 0
        self.dropped = 0  # since the start

    def _count(self, e: Entry, sign: int) -> None:
        self.entries += sign
        self.pairs += sign * len(e.to)
        self.bytes += sign * e.size

    def put(self, e: Entry) -> None:
        """Takes e; for its servers it replaces what its key had."""
        kept, servers = [e], e.to
        for old in self._keys.get(e.key, ()):
            self._count(old, -1)
            if old.value == e.value:
                old.to |= servers  # typing comes server by server: only what is new is copied
                e.to = old.to
                continue
            old.to -= servers
            if old.to:
                self._count(old, 1)
                kept.insert(len(kept) - 1, old)
        self._count(e, 1)
        self._keys[e.key] = kept
        self._bound()

    def put_back(self, entries: Sequence[Entry]) -> None:
        """Returns what take gave, before everything else; what came since is newer and stays."""
        for e in reversed(entries):
            newer = self._keys.get(e.key, [])
            for n in newer:
                e.to -= n.to
            if e.to:
                self._count(e, 1)
                self._keys[e.key] = [e, *newer]
                self._keys.move_to_end(e.key, last=False)
        self._bound()

    def _bound(self) -> None:
        entries, pairs, size = self._max
        while self.entries > entries or self.pairs > pairs or self.bytes > size:
            key = next(iter(self._keys))
            self._count(self._keys[key].pop(0), -1)
            self.dropped += 1
            if not self._keys[key]:
                del self._keys[key]

    def take(self, most: int) -> List[Entry]:
        """Removes and returns the oldest, at most so many."""
        out: List[Entry] = []
        while self._keys and len(out) < most:
            key, entries = self._keys.popitem(last=False)
            n = most - len(out)
            for e in entries[:n]:
                self._count(e, -1)
                out.append(e)
            if entries[n:]:
                self._keys[key] = entries[n:]
                self._keys.move_to_end(key, last=False)
        return out


def json_size(value: Any) -> int:
    """The bytes of value as compact JSON."""
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass"))


def set_id(servers: Iterable[str]) -> str:
    """The name of a set of servers: the start of the SHA-256 of its sorted names, a line each."""
    lines = "".join(s + "\n" for s in sorted(servers))
    return hashlib.sha256(lines.encode()).hexdigest()[:32]


def file_hash() -> str:
    """The SHA-256 of this file, or "" if it cannot be read."""
    try:
        with open(__file__, "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()
    except OSError:
        return ""


def unknown_in_synapse() -> str:
    """What this Synapse has that the module does not know; "" for nothing."""
    for known, must in ((KNOWN, True), (KNOWN_IF_THERE, False)):
        for module, cls, name, is_async, params in known:
            where = ".".join(p for p in (module, cls, name) if p)
            try:
                owner: Any = importlib.import_module(module)
                f = getattr(getattr(owner, cls) if cls else owner, name)
            except (ImportError, AttributeError):
                if must:
                    return "there is no %s" % where
                continue
            signature = inspect.signature(f)
            if tuple(signature.parameters) != params:
                return "%s is %s" % (where, signature)
            if is_async is not None and inspect.iscoroutinefunction(f) != is_async:
                return "%s is %sa coroutine function" % (where, "not " if is_async else "")
    return ""


def unknown_in_sender(sender: Any) -> str:
    """What this sender has that the module does not know; "" for nothing."""
    cls = importlib.import_module("synapse.federation.sender").FederationSender
    if type(sender) is not cls:
        return "the sender is a %s" % type(sender).__name__
    for _, c, name, _, _ in KNOWN:
        if c == "FederationSender" and name in vars(sender):
            return "another module has changed %s" % name
    for name in ATTRIBUTES:
        if not hasattr(sender, name):
            return "the sender has no %s" % name
    return ""


class Bus:
    """The hand-over to fsbus: its requests, its limits, and which sets of servers it knows."""

    def __init__(self, client: Any, instance: str, secret: Optional[str], synapse: str) -> None:
        self._client = client
        self._uri = "synapse-replication://%s%s" % (instance, PATH)
        self._headers = {b"Authorization": [b"Bearer " + secret.encode()]} if secret else {}
        self._synapse = synapse
        self._module = file_hash()
        self._sets: "OrderedDict[str, None]" = OrderedDict()
        self._greeted = False
        self._said_hash = False
        self.max_bytes, self.max_items, self.max_sets = 4 << 20, 1000, 1000

    async def _request(self, f: Callable[..., Awaitable[Any]], what: Any) -> Any:
        """One request. Raises Away, Off, or the HttpResponseException for 409 and 413."""
        error = importlib.import_module("synapse.api.errors").HttpResponseException
        try:
            answer = await f(self._uri, what, headers=self._headers)
        except error as e:
            if e.code in (409, 413):
                raise
            if 400 <= e.code < 500 and e.code != 429:
                raise Off("fsbus answers %d (%s)" % (e.code, _errcode(e))) from e
            raise Away("it answers %d" % e.code) from e
        except Exception as e:
            raise Away("%s: %s" % (type(e).__name__, e)) from e
        if not isinstance(answer, dict):
            raise Off("fsbus answers with something else than an object")
        return answer

    async def greet(self) -> None:
        """Asks the bus for its version and limits. Raises Away or Off."""
        args = {"version": str(VERSION), "module": self._module, "synapse": self._synapse}
        try:
            answer = await self._request(self._client.get_json, args)
        except (Away, Off):
            raise
        except Exception as e:
            raise Off("fsbus answers a question with %s" % e) from e
        if answer.get("version") != VERSION:
            raise Off("fsbus speaks version %r, this module %d" % (answer.get("version"), VERSION))
        for name in ("max_bytes", "max_items", "max_sets"):
            n = answer.get(name)
            if isinstance(n, int) and n > 0:
                setattr(self, name, n)
        theirs = answer.get("module")
        if theirs and theirs != self._module and not self._said_hash:
            self._said_hash = True
            logger.warning("fsbus: this file is not the one of fsbus %s; 'fsbus synapse-module' prints that one",
                           answer.get("fsbus"))
        self._greeted = True

    async def hand_over(self, items: Sequence[Item]) -> List[Set[str]]:
        """Gives items to the bus, in order.

        Returns for each the servers that the bus refuses. Raises Away if not everything was taken (a repeat does no
        harm) and Off.
        """
        if not self._greeted:
            await self.greet()
        left: List[Set[str]] = [set() for _ in items]
        try:
            for batch in self._batches(items):
                await self._send(batch, left)
        except Away:
            self._greeted = False
            raise
        return left

    def _batches(self, items: Sequence[Item]) -> Iterator[List[Tuple[int, Item]]]:
        """Cuts items into requests within the limits, counting each list of servers as if it had to travel."""
        batch: List[Tuple[int, Item]] = []
        sets: Set[FrozenSet[str]] = set()
        size = 0
        for i, whole in enumerate(items):
            for item in self._parts(whole):
                n = item.size + 128
                if item.to not in sets:
                    n += _names_size(item.to)
                full = size + n > self.max_bytes - 1024 or len(batch) >= self.max_items
                if batch and (full or (item.to not in sets and len(sets) >= self.max_sets)):
                    yield batch
                    batch, sets, size = [], set(), 0
                    n = item.size + 128 + _names_size(item.to)
                batch.append((i, item))
                sets.add(item.to)
                size += n
        if batch:
            yield batch

    def _parts(self, item: Item) -> Iterator[Item]:
        """The item, for at most MAX_SET servers whose names fill at most half a request."""
        if len(item.to) <= MAX_SET and _names_size(item.to) <= self.max_bytes // 2:
            yield item
            return
        part: List[str] = []
        size = 0
        for s in sorted(item.to):
            n = len(s.encode()) + 3
            if part and (len(part) >= MAX_SET or size + n > self.max_bytes // 2):
                yield Item(item.payload, frozenset(part), item.size)
                part, size = [], 0
            part.append(s)
            size += n
        yield Item(item.payload, frozenset(part), item.size)

    async def _send(self, batch: Sequence[Tuple[int, Item]], left: List[Set[str]]) -> None:
        """One request, and the further ones that its answer asks for."""
        ids: Dict[FrozenSet[str], str] = {}
        for _, item in batch:
            if item.to not in ids:
                ids[item.to] = set_id(item.to)
        for _ in range(3):
            try:
                answer = await self._request(self._client.post_json_get_json, self._body(batch, ids))
            except (Away, Off):
                raise
            except Exception as e:
                code = getattr(e, "code", 0)
                if code == 413:
                    await self._split(batch, left)
                    return
                unknown = _unknown_sets(e)
                if not unknown:
                    raise Off("fsbus answers %s (%s)" % (code, _errcode(e))) from e
                for name in unknown:
                    self._sets.pop(name, None)
                continue
            self._taken(batch, answer, left)
            for name in ids.values():
                self._sets[name] = None
                self._sets.move_to_end(name)
            while len(self._sets) > MAX_KNOWN_SETS:
                self._sets.popitem(last=False)
            return
        # Others may fill its memory of sets: let it breathe.
        raise Away("it forgets the lists of servers at once")

    def _body(self, batch: Sequence[Tuple[int, Item]], ids: Mapping[FrozenSet[str], str]) -> Dict[str, Any]:
        lists = [{"id": name, "servers": sorted(to)} for to, name in ids.items() if name not in self._sets]
        items = [dict(item.payload, to=ids[item.to]) for _, item in batch]
        return {"version": VERSION, "module": self._module, "synapse": self._synapse, "sets": lists, "items": items}

    async def _split(self, batch: Sequence[Tuple[int, Item]], left: List[Set[str]]) -> None:
        """What is too large goes in two halves; one payload to one server goes back to Synapse."""
        if len(batch) > 1:
            half = len(batch) // 2
            halves = [batch[:half], batch[half:]]
        else:
            i, item = batch[0]
            names = sorted(item.to)
            if len(names) <= 1:
                left[i] |= item.to
                return
            half = len(names) // 2
            halves = [[(i, Item(item.payload, frozenset(part), item.size))] for part in (names[:half], names[half:])]
        for part in halves:
            await self._send(part, left)

    @staticmethod
    def _taken(batch: Sequence[Tuple[int, Item]], answer: Mapping[str, Any], left: List[Set[str]]) -> None:
        servers, items = answer.get("refused") or {}, answer.get("refused_items") or {}
        if not isinstance(servers, dict) or not isinstance(items, dict):
            raise Off("fsbus answers with something that this module does not know")
        for n, (i, item) in enumerate(batch):
            left[i] |= item.to if str(n) in items else item.to.intersection(servers)
        if servers or items:
            logger.debug("fsbus refuses servers %s, items %s", servers, items)


def _names_size(servers: Collection[str]) -> int:
    return 64 + sum(len(s.encode()) + 3 for s in servers)


def _error_body(e: Exception) -> Mapping[str, Any]:
    try:
        body = json.loads(getattr(e, "response", b""))
    except (TypeError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def _errcode(e: Exception) -> str:
    return str(_error_body(e).get("errcode", "no errcode"))[:100]


def _unknown_sets(e: Exception) -> List[str]:
    body = _error_body(e)
    unknown = body.get("unknown")
    if body.get("errcode") != "FSBUS_UNKNOWN_SETS" or not isinstance(unknown, list):
        return []
    return [u for u in unknown if isinstance(u, str)]


class Fsbus:
    """The module. Config: instance, the name of fsbus in instance_map ("fsbus")."""

    @staticmethod
    def parse_config(config: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
        return {"instance": str((config or {}).get("instance", "fsbus"))}

    def __init__(self, config: Mapping[str, Any], api: Any) -> None:
        self._on = False
        try:
            why = self._prepare(config, api)
        except Exception as e:
            why = "%s: %s" % (type(e).__name__, e)
        if why:
            logger.warning("fsbus: nothing is changed, Synapse sends by itself: %s", why)

    def _prepare(self, config: Mapping[str, Any], api: Any) -> str:
        """Gets ready and asks the bus. Returns why not; "" also for a worker that sends nothing."""
        hs = self._hs = api._hs
        self._api = api
        if not hs.should_send_federation():
            return ""
        why = unknown_in_synapse()
        if why:
            return why
        sender = self._sender = hs.get_federation_sender()
        why = unknown_in_sender(sender)
        if why:
            return why
        if config["instance"] not in hs.config.worker.instance_map:
            return "instance_map in homeserver.yaml has no %s" % config["instance"]
        version = str(getattr(importlib.import_module("synapse.util"), "SYNAPSE_VERSION", ""))
        if not version:
            try:
                version = importlib.import_module("importlib.metadata").version("matrix-synapse")
            except Exception:  # an unpacked Synapse has no metadata
                version = ""
        self._bus = Bus(hs.get_replication_client(), config["instance"], hs.config.worker.worker_replication_secret,
                        version)
        self._own_pdu = sender._send_pdu
        self._own_receipt = sender.send_read_receipt
        self._own_presence = sender.send_presence_to_destinations
        self._own_edu = sender.send_edu
        self._gathered = Gathered()
        self._flushing = False
        self._away_since = 0
        self._said_away = 0  # when
        self._said_dropped = (0, 0)  # how many, when
        self._marked: "OrderedDict[str, None]" = OrderedDict()
        self._reactor, self._clock = hs.get_reactor(), hs.get_clock()
        self._background(self._start)
        return ""

    async def _start(self) -> None:
        """Takes over as soon as the bus answers. Until then Synapse sends by itself."""
        delay, said = WAIT_MIN, False
        while not self._is_shut_down():
            try:
                await self._bus.greet()
            except Off as e:
                logger.warning("fsbus: nothing is changed, Synapse sends by itself until its next start: %s", e)
                return
            except Away as e:
                if not said:
                    logger.warning("fsbus does not answer; Synapse sends by itself until it does: %s", e)
                said = True
                await self._sleep(delay)
                delay = min(delay * 2, WAIT_MAX)
                continue
            self._take_over()
            return

    def _take_over(self) -> None:
        sender = self._sender
        sender._send_pdu = self._send_pdu
        sender.send_read_receipt = self._send_read_receipt
        if inspect.iscoroutinefunction(self._own_presence):
            sender.send_presence_to_destinations = self._send_presence
        else:
            sender.send_presence_to_destinations = self._send_presence_sync
        sender.send_edu = self._send_edu
        self._on = True
        logger.info("fsbus: what goes to other servers is handed over")
        try:
            # What Synapse had not sent when it ended would otherwise wait for the next event.
            sender.notify_new_events(sender.store.get_room_max_token())
        except Exception as e:
            logger.info("fsbus: what was under way goes with the next event: %s", e)

    # What every part needs.

    def _background(self, f: Callable[..., Awaitable[None]]) -> None:
        run = getattr(self._api, "run_as_background_process", None)  # 1.136
        if run is None:
            run = importlib.import_module("synapse.metrics.background_process_metrics").run_as_background_process
        run("fsbus_handover", f)

    def _is_shut_down(self) -> bool:
        return bool(getattr(self._sender, "_is_shutdown", False))

    async def _until_fired(self, seconds: Optional[float]) -> None:
        deferred = importlib.import_module("twisted.internet.defer").Deferred()
        if seconds is not None:
            self._reactor.callLater(seconds, deferred.callback, None)
        await importlib.import_module("synapse.logging.context").make_deferred_yieldable(deferred)

    async def _sleep(self, seconds: float) -> None:
        # Not Clock.sleep: its argument changed in 1.144.
        await self._until_fired(seconds)

    def _servers(self, names: Iterable[str]) -> Set[str]:
        """Those of names to which this process may send."""
        sender, federation = self._sender, self._hs.config.federation
        allowed = getattr(federation, "is_domain_allowed_according_to_federation_whitelist", None)
        if allowed is None:
            whitelist = federation.federation_domain_whitelist

            def allowed(name: str) -> bool:
                return whitelist is None or name in whitelist

        handles = sender._federation_shard_config.should_handle
        return {n for n in names if n != sender.server_name and allowed(n) and handles(sender._instance_name, n)}

    def _went_off(self, why: Off) -> None:
        if self._on:
            self._on = False
            logger.warning("fsbus: from now on Synapse sends by itself, until its next start: %s", why)

    def _is_away(self, why: Away) -> None:
        now = self._clock.time_msec()
        self._away_since = self._away_since or now
        if not self._said_away or now - self._said_away > SAY_AGAIN_MS:
            self._said_away = now
            logger.warning("fsbus is away, events wait for it: %s", why)

    def _is_back(self) -> None:
        if self._away_since:
            if self._said_away >= self._away_since:
                logger.info("fsbus is back after %.1f s", (self._clock.time_msec() - self._away_since) / 1000)
            self._away_since = 0

    # Events.

    async def _send_pdu(self, pdu: Any, destinations: Iterable[str]) -> None:
        to = set(destinations)
        try:
            to = await self._hand_over_pdu(pdu, to)
        except Exception:
            logger.exception("fsbus: %s goes Synapse's own way", pdu.event_id)
        if to:
            await self._mark(to, pdu.internal_metadata.stream_ordering - 1)
            await self._own_pdu(pdu, to)

    async def _hand_over_pdu(self, pdu: Any, destinations: Set[str]) -> Set[str]:
        """Returns, after the bus has it, to which servers Synapse must send the event."""
        if not self._on or self._wants_delivered():
            return destinations
        servers = self._servers(destinations)
        own = {s for s in servers if self._is_busy(s)}
        if pdu.type == "m.room.encrypted":
            own |= await self._with_keys(servers - own)
        to = frozenset(servers - own)
        body = self._serialize(pdu)
        if body is None:
            return destinations
        if not to:
            return own
        item = Item({"pdu": body, "event_id": pdu.event_id, "room_id": pdu.room_id}, to)
        delay = WAIT_MIN
        while self._on:
            try:
                refused = (await self._bus.hand_over([item]))[0]
            except Off as e:
                self._went_off(e)
                break
            except Away as e:
                self._is_away(e)
                if self._is_shut_down():
                    # Neither an error nor the end of it: the position must not move, so that the next start repeats it.
                    await self._until_fired(None)
                await self._sleep(delay)
                delay = min(delay * 2, WAIT_MAX)
                continue
            self._is_back()
            own |= refused
            self._count_pdu(len(to - refused), not own)
            return own
        return own | to

    def _wants_delivered(self) -> bool:
        """Whether a module is to be told of each delivery (1.158): only Synapse's own way does."""
        callbacks = getattr(self._sender._transaction_manager, "_federation_callbacks", None)
        f = getattr(callbacks, "interested_in_events_delivered_over_federation", None)
        return f is not None and bool(f())

    def _is_busy(self, server: str) -> bool:
        """Whether Synapse has something under way to server that the event must not overtake."""
        q = self._sender._per_destination_queues.get(server)
        if q is None:
            return False
        return any(getattr(q, a, True) for a in ("transmission_loop_running", "_pending_pdus", "_new_data_to_send"))

    async def _with_keys(self, servers: Set[str]) -> Set[str]:
        """Those for which to-device messages are still in the database: the keys of this event may be among them."""
        if not servers:
            return set()
        names = sorted(servers)

        def txn(t: Any) -> Set[str]:
            out: Set[str] = set()
            for i in range(0, len(names), SQL_NAMES):
                some = names[i:i + SQL_NAMES]
                t.execute(
                    "WITH d (name) AS (VALUES %s) SELECT name FROM d WHERE EXISTS "
                    "(SELECT 1 FROM device_federation_outbox o WHERE o.destination = d.name)"
                    % ", ".join(["(?)"] * len(some)), some)
                out.update(row[0] for row in t.fetchall())
            return out

        found: Set[str] = await self._sender.store.db_pool.runInteraction("fsbus_keys", txn)
        return found

    def _serialize(self, pdu: Any) -> Optional[Dict[str, Any]]:
        """The event as it goes over federation; None if Synapse would not send it."""
        now = self._clock.time_msec()
        f = getattr(importlib.import_module("synapse.federation.units"), "serialize_and_filter_pdus", None)  # 1.127.1
        out = f([pdu], now) if f else [pdu.get_pdu_json(now)]
        return out[0] if out else None

    def _count_pdu(self, servers: int, first: bool) -> None:
        """Synapse's own metrics. The event itself is counted once, by Synapse where it sends a part of it."""
        module = importlib.import_module("synapse.federation.sender")
        for name, n in (("sent_pdus_destination_dist_total", servers),
                        ("sent_pdus_destination_dist_count", int(first))):
            counter = getattr(module, name, None)
            if counter is None or n == 0:
                continue
            if getattr(counter, "_labelnames", ()):
                counter = counter.labels(**{"server_name": self._sender.server_name})
            counter.inc(n)

    async def _mark(self, servers: Iterable[str], position: int) -> None:
        """Gives servers that have none a last successful position, without which catch-up passes the event over."""
        store = self._sender.store
        for s in servers:
            if s == self._sender.server_name or s in self._marked:
                continue
            try:
                if await store.get_destination_last_successful_stream_ordering(s) is None:
                    await store.set_destination_last_successful_stream_ordering(s, position)
            except Exception as e:
                logger.warning("fsbus: no catch-up for %s: %s", s, e)
                continue
            self._marked[s] = None
            if len(self._marked) > MAX_MARKED:
                self._marked.popitem(last=False)

    # What is volatile.

    async def _send_read_receipt(self, receipt: Any) -> None:
        taken = False
        try:
            if self._on:
                state = self._sender._storage_controllers.state
                to = self._servers(
                    await state.get_current_hosts_in_room_or_partial_state_approximation(receipt.room_id))
                data = dict(receipt.data)
                if receipt.thread_id is not None:
                    data["thread_id"] = receipt.thread_id
                content = {receipt.room_id: {receipt.receipt_type: {
                    receipt.user_id: {"event_ids": list(receipt.event_ids), "data": data}}}}
                key = ("m.receipt", receipt.room_id, receipt.receipt_type, receipt.user_id, receipt.thread_id)
                self._put(key, content, to, json_size(content))
                taken = True
        except Exception:
            logger.exception("fsbus: a receipt goes Synapse's own way")
        if not taken:
            await self._own_receipt(receipt)

    async def _send_presence(self, states: Iterable[Any], destinations: Iterable[str]) -> None:
        states, destinations = list(states), list(destinations)
        if not self._take_presence(states, destinations):
            await self._own_presence(states, destinations)

    def _send_presence_sync(self, states: Iterable[Any], destinations: Iterable[str]) -> None:
        states, destinations = list(states), list(destinations)
        if not self._take_presence(states, destinations):
            self._own_presence(states, destinations)

    def _take_presence(self, states: List[Any], destinations: List[str]) -> bool:
        try:
            if not self._on or not self._hs.config.server.track_presence:
                return False
            if not all(self._sender.is_mine_id(s.user_id) for s in states):
                return False  # Synapse's own way has an assertion for it
            to = self._servers(destinations)
            for s in states:
                self._put(("m.presence", s.user_id), s, set(to), 300 + len((s.status_msg or "").encode()))
            return True
        except Exception:
            logger.exception("fsbus: presence goes Synapse's own way")
            return False

    def _send_edu(self, edu: Any, key: Optional[Hashable]) -> None:
        try:
            if self._on and edu.edu_type == "m.typing":
                c = edu.content
                to = self._servers([edu.destination])
                self._put(("m.typing", c.get("room_id"), c.get("user_id")), dict(c), to, json_size(c))
                return
        except Exception:
            logger.exception("fsbus: typing goes Synapse's own way")
        self._own_edu(edu, key)

    def _put(self, key: Tuple[Any, ...], value: Any, to: Set[str], size: int) -> None:
        if not to:
            return
        self._gathered.put(Entry(key, value, to, size, self._clock.time_msec()))
        n, when = self._said_dropped
        if self._gathered.dropped > n and self._clock.time_msec() - when > SAY_AGAIN_MS:
            logger.warning("fsbus: %d receipts, presence or typing notices are dropped: too many wait",
                           self._gathered.dropped - n)
            self._said_dropped = (self._gathered.dropped, self._clock.time_msec())
        self._schedule()

    def _schedule(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._reactor.callLater(WINDOW, self._background, self._flush)

    async def _flush(self) -> None:
        """Hands over what has gathered. Only one of it runs."""
        delay = WAIT_MIN
        try:
            while True:
                entries = self._gathered.take(self._bus.max_items)
                if not entries:
                    return
                now = self._clock.time_msec()
                entries = [e for e in entries if e.key[0] != "m.typing" or now - e.since < TYPING_LIVES_MS]
                left = [e.to for e in entries]
                try:
                    if self._on and entries:
                        left = await self._bus.hand_over([Item({"edu": self._edu(e)}, frozenset(e.to)) for e in entries])
                        self._is_back()
                except Off as e:
                    self._went_off(e)
                except Away as e:
                    self._is_away(e)
                    self._gathered.put_back(entries)
                    if self._is_shut_down():
                        return
                    await self._sleep(delay)
                    delay = min(delay * 2, WAIT_MAX)
                    continue
                delay = WAIT_MIN
                for entry, to in zip(entries, left):
                    await self._own_way(entry, to)
                if len(entries) < self._bus.max_items:
                    return  # what came meanwhile gathers for a window
        except Exception:
            logger.exception("fsbus: some receipts, presence or typing notices are lost")
        finally:
            self._flushing = False
            if self._gathered.entries and not self._is_shut_down():
                self._schedule()

    def _edu(self, e: Entry) -> Dict[str, Any]:
        kind, content = e.key[0], e.value
        if kind == "m.presence":
            f = importlib.import_module("synapse.handlers.presence").format_user_presence_state
            content = {"push": [f(e.value, self._clock.time_msec())]}
        return {"edu_type": kind, "content": content}

    async def _own_way(self, e: Entry, to: Set[str]) -> None:
        """Gives to Synapse what the bus refused."""
        if not to:
            return
        if e.key[0] == "m.presence":
            result = self._own_presence([e.value], sorted(to))
            if inspect.isawaitable(result):
                await result
            return
        edu = importlib.import_module("synapse.federation.units").Edu
        for s in sorted(to):
            # A receipt too: send_read_receipt has no list of servers.
            self._own_edu(edu(origin=self._sender.server_name, destination=s, edu_type=e.key[0], content=e.value), e.key)
