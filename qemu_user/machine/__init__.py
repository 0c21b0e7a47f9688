"""The machine: its map, its device tree, how it boots, its interrupt wires, its life."""
