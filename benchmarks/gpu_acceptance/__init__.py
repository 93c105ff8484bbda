"""GPU acceptance in one command: everything about qpert that only an NVIDIA GPU can show, each line with its goal.

    PYTHONPATH=benchmarks python -m gpu_acceptance            # `make gpu-acceptance`
    PYTHONPATH=benchmarks python -m gpu_acceptance --dry-run  # the same code on the CPU, with a small model

| module | is |
| --- | --- |
| `goals` | every goal, with its source or reason |
| `scale` | which models, sizes and providers: those of an acceptance, and those of a dry run |
| `lines` | the vocabulary: a line, its checks, its result |
| `plan` | all lines in order |
| `judge` | from what a line's process printed to its checks |
| `measure/` | the programs that lines run, each in a process of its own, one JSON document on stdout |
| `process` | runs one of them: time limit, crash, memory that ran out |
| `runner` | runs what is not done yet, and keeps each result as soon as it is there |
| `environment` | the machine; what a result depends on |
| `page` | the report |
"""
