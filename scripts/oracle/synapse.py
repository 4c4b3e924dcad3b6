"""Answers, a line of JSON for a line of JSON, what a Synapse makes of headers,
requests and events. It calls the functions of the Synapse that it is run with."""

import asyncio, base64, io, json, logging, sys
from types import SimpleNamespace

import nacl.signing
import synapse
from signedjson.key import decode_signing_key_base64, decode_verify_key_bytes
from signedjson.sign import signature_ids, verify_signed_json
from synapse.api.room_versions import KNOWN_ROOM_VERSIONS
from synapse.federation.federation_base import event_from_pdu_json
from synapse.federation.transport.server._base import Authenticator, _parse_auth_header
from synapse.http.matrixfederationclient import MatrixFederationHttpClient
from synapse.http.servlet import parse_json_object_from_request
from synapse.util.json import json_decoder

logging.disable(logging.CRITICAL)


class Keyring:
    """Has all the keys, and checks each signature that it has a key for."""

    def __init__(self, keys):
        self.keys = {i: decode_verify_key_bytes(i, base64.b64decode(k)) for i, k in keys.items()}

    async def verify_json_for_server(self, server, obj, now):
        found = [i for i in signature_ids(obj, server) if i in self.keys]
        if not found:
            raise ValueError("no key")
        for i in found:
            verify_signed_json(obj, server, self.keys[i])


async def nothing(*_):
    return None


def authenticator(q):
    a = object.__new__(Authenticator)
    a._clock = SimpleNamespace(time_msec=lambda: 0)
    a.keyring = Keyring(q["keys"])
    a.server_name = q["server"]
    a._is_mine_server_name = lambda name: name == q["server"]
    a.federation_domain_whitelist = None
    a.store = SimpleNamespace(get_destination_retry_timings=nothing)
    return a


def request(q):
    method = q["method"].encode("ascii")
    r = SimpleNamespace(
        method=method,
        uri=base64.b64decode(q["target"]),
        content=io.BytesIO(base64.b64decode(q["body"])),
        requestHeaders=SimpleNamespace(
            getRawHeaders=lambda _: [base64.b64decode(h) for h in q["headers"]]
        ),
    )
    content = parse_json_object_from_request(r) if method in (b"PUT", b"POST") else None
    return {"origin": asyncio.run(authenticator(q).authenticate_request(r, content))}


def header(q):
    origin, key, sig, destination = _parse_auth_header(base64.b64decode(q["header"]))
    return {"origin": origin, "key": key, "sig": sig, "destination": destination or ""}


def sign(q):
    c = object.__new__(MatrixFederationHttpClient)
    c.server_name = q["origin"]
    c.signing_key = decode_signing_key_base64("ed25519", q["version"], q["seed"])
    body = base64.b64decode(q["body"]).decode("utf-8")
    content = json_decoder.decode(body) if body else None
    headers = c.build_auth_headers(
        q["destination"].encode("ascii"), q["method"].encode("ascii"), base64.b64decode(q["target"]), content
    )
    return {"header": headers[0].decode("ascii")}


def ids(q):
    """The id of an event in each room version that takes it."""
    found = {}
    for version in map(str, range(1, 13)):
        try:
            pdu = json_decoder.decode(q["event"])
            found[version] = event_from_pdu_json(pdu, KNOWN_ROOM_VERSIONS[version]).event_id
        except Exception:
            pass
    return {"ids": found}


def version(_):
    return {"version": synapse.__version__ + ", Python " + sys.version.split()[0]}


for line in sys.stdin:
    q = json.loads(line)
    try:
        answer = globals()[q["op"]](q)
    except Exception as e:
        answer = {"error": "%s: %s" % (type(e).__name__, e)}
    print(json.dumps(answer), flush=True)
