"""What a request's grammar (`response_format`, `structured_outputs`, strict tools) may cost: each is compiled on trial,
in a process of its own with a limit of CPU time, before the engine sees it."""
