"""From Python semantics to native code: values, traces, and their emission as LLVM IR text."""
