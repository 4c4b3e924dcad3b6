#!/usr/bin/env python3
"""Says whether fsbus_handover.py would take over in a Synapse, from its sources, without running them.

    check_versions.py /usr/lib/python3/dist-packages/synapse ...

Each argument is a package folder named synapse, or a folder that has one. Exits with 1 if one would not be taken over.
"""

import ast
import os
import sys
from typing import Any, Dict, List, Optional, Set, Tuple, Union

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
MODULE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fsbus_handover.py")
# What the module reads of a queue: without it every event goes Synapse's own way.
QUEUE = ("transmission_loop_running", "_pending_pdus", "_new_data_to_send")


def constants() -> Dict[str, Any]:
    """The module's tables."""
    out: Dict[str, Any] = {}
    with open(MODULE, encoding="utf-8") as f:
        tree = ast.parse(f.read())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            if node.target.id in ("KNOWN", "KNOWN_IF_THERE", "ATTRIBUTES"):
                out[node.target.id] = ast.literal_eval(node.value)
    return out


def parse(package: str, module: str) -> Optional[ast.Module]:
    path = os.path.join(package, *module.split(".")[1:])
    for p in (path + ".py", os.path.join(path, "__init__.py")):
        if os.path.exists(p):
            with open(p, encoding="utf-8") as f:
                return ast.parse(f.read())
    return None


def members(tree: ast.Module, cls: str) -> List[ast.stmt]:
    """The statements of a module, or of a class in it."""
    if not cls:
        return tree.body
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            return node.body
    return []


def function(body: List[ast.stmt], name: str) -> Optional[Function]:
    found = None
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            found = node  # the last one counts, after any @overload
    return found


def parameters(f: Function) -> Tuple[str, ...]:
    a = f.args
    names = [p.arg for p in a.posonlyargs + a.args]
    if a.vararg:
        names.append(a.vararg.arg)
    names += [p.arg for p in a.kwonlyargs]
    if a.kwarg:
        names.append(a.kwarg.arg)
    return tuple(names)


def set_in_init(body: List[ast.stmt]) -> Set[str]:
    """The attributes that __init__ sets on self."""
    init = function(body, "__init__")
    return {
        n.attr for n in ast.walk(init) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        and isinstance(n.value, ast.Name) and n.value.id == "self"
    } if init else set()


def unknown(package: str) -> List[str]:
    """What the Synapse in package has that the module does not know."""
    out = []
    tables = constants()
    for table in ("KNOWN", "KNOWN_IF_THERE"):
        for module, cls, name, is_async, params in tables[table]:
            where = ".".join(p for p in (module, cls, name) if p)
            tree = parse(package, module)
            f = function(members(tree, cls), name) if tree else None
            if f is None:
                if table == "KNOWN":
                    out.append("there is no " + where)
                continue
            if parameters(f) != params:
                out.append("%s(%s)" % (where, ", ".join(parameters(f))))
            if is_async is not None and isinstance(f, ast.AsyncFunctionDef) != is_async:
                out.append("%s is %sasync" % (where, "not " if is_async else ""))
    for module, cls, names in (("synapse.federation.sender", "FederationSender", tables["ATTRIBUTES"]),
                               ("synapse.federation.sender.per_destination_queue", "PerDestinationQueue", QUEUE)):
        tree = parse(package, module)
        there = set_in_init(members(tree, cls)) if tree else set()
        out += ["%s has no %s" % (cls, n) for n in names if n not in there]
    return out


def main(arguments: List[str]) -> int:
    if not arguments:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    bad = 0
    for path in arguments:
        package = path if os.path.isdir(os.path.join(path, "federation")) else os.path.join(path, "synapse")
        if not os.path.isdir(os.path.join(package, "federation")):
            print("%s: there is no Synapse" % path)
            bad = 1
            continue
        why = unknown(package)
        bad |= bool(why)
        print("%s: %s" % (path, "the module would change nothing: " + "; ".join(why) if why
                          else "the module takes over"))
    return bad


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
