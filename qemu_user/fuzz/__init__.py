"""The protocol's fuzzer (`softkvm fuzz`): sequences from the ABI's table, targets, oracles, replay, minimize, report.

A client: it imports protocol only, and starts kvmcore as anybody does, by its command line. docs/fuzz.md.
"""
