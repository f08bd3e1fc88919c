"""Bad lines between hosts, as a program on a host of its own: a `marble.testing.relay.Relay` for each way from one node to another.

Its argument is a JSON object of where each listens and leads to, by name. Each line on standard input is one, too: the ``name`` of a
relay and what is to happen to it (``there`` and ``back``, fields of `Line`; ``reset``); each is answered with its counts.
"""

from __future__ import annotations

import contextlib
import json
import sys

from marble.testing.relay import Line, Relay


def main() -> None:
    with contextlib.ExitStack() as stack:
        relays = {
            name: stack.enter_context(Relay(target, listen=listen, seed=seed))
            for seed, (name, (listen, target)) in enumerate(json.loads(sys.argv[1]).items())
        }
        print("{}", flush=True)
        for text in sys.stdin:
            command = json.loads(text)
            relay = relays[command["name"]]
            relay.set(**{name: Line(**command[name]) for name in ("there", "back") if name in command})
            if command.get("reset"):
                relay.reset()
            print(json.dumps(relay.counts()), flush=True)


if __name__ == "__main__":
    main()
