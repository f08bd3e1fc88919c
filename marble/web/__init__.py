"""How a node is, for people and for machines: health, metrics, and a page in a browser. Works beside the node, never in it."""
