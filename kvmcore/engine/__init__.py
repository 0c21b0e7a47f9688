"""Running guest code natively: the interpreter image, its loader, and the machines and harts that use it."""
