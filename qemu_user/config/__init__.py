"""What the user asks for: one validated tree (MachineConfig), and the ways to write it."""
