"""The entry point of the command `lowkey`.

It sets how threads wait. OpenMP reads that setting only when torch is loaded, so it has to be set before.
"""

import os


def main() -> None:
    """Run the command line, with threads that sleep while they wait for one another.

    By default, waiting threads spin. When another program needs a core too, a spinning thread can keep the
    thread that it waits for from running: on two cores beside one busy program, a matrix product with two
    threads took 100 times as long as with one. Sleeping has no measurable cost. If `OMP_WAIT_POLICY` is set
    in the environment, it is respected.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lowkey.cli.app import main as run

    run()
