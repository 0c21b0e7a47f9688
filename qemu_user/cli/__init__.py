"""The command `softkvm`: one verb a file. main.py finds the verb before anything heavy is imported."""
