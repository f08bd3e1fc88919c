"""``marble demo``: three nodes, real data, a killed leader, and a comparison of every value on every replica.

- `source` finds the rows and proves that the key names each of them once;
- `processes` runs the nodes as operating-system processes and leaves none behind;
- `writer` keeps a window of writes under way and repeats those whose outcome is not known;
- `compare` holds a replica against the source, value by value;
- `display` shows how it goes, on a terminal or in a plain log;
- `scenario` is the story itself.

The demo is a client like any other: it knows marble by `marble.client`, the config file and ``marble serve`` alone.
"""
