"""Where the bytes of consoles go: terminals, sockets, files. One file per kind."""
