"""`tinyvllm bench cold-start`."""

from __future__ import annotations

import dataclasses

from rich.console import Group

from tinyvllm.cli.bench_flags import SubjectFlags, print_table
from tinyvllm.cli.flags import EngineFlags
from tinyvllm.cli.terminal import progress_bars


def cold_start(*, subject: SubjectFlags, engine: EngineFlags) -> None:
    """Time a start, from the process to the first token and to the last graph.

    A start reuses the programs that earlier starts compiled. For a start from scratch, point TINYVLLM_CACHE and
    XDG_CACHE_HOME to empty directories. The graphs are those that `serve` captures with the same flags."""
    from tinyvllm.execution.early_start import begin_early

    engine.apply()
    begin_early(engine.make_config(""), subject.num_layers(pull=engine.pull))

    from tinyvllm.bench.cold_start import import_engine, process_age

    process_s = process_age()
    import_s = import_engine()

    from tinyvllm.bench.breakdown_tables import cold_start_table, trust_lines
    from tinyvllm.bench.cold_start import start_engine
    from tinyvllm.bench.estimate import Estimate
    from tinyvllm.bench.trust import ConditionsWatch

    found, watch = subject.find(pull=engine.pull), ConditionsWatch()
    with progress_bars() as report, watch:
        runner, start = start_engine(found, engine.make_config(found.name), report, process_s, import_s, num_calls=0)
        runner.close()  # ends the compiling processes, whose time is then known to be this one's
    start = dataclasses.replace(start, trust=watch.trust(Estimate(start.total_s)))
    print_table(Group(cold_start_table(start), *trust_lines(start.trust)))
    subject.write_json(start.as_json())
