"""What the command `lowkey` starts with. It sets how threads wait before torch is loaded, because OpenMP
reads that only then.
"""

import os


def main() -> None:
    """Run the command line, with threads that sleep while they wait for others.

    A thread that spins instead keeps a core from the very thread that it waits for, whenever another program
    wants a core too: on two cores beside one busy program, a matrix product took 100 times as long with two
    threads as with one. Sleeping costs nothing that can be measured. `OMP_WAIT_POLICY` in the environment
    comes first.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lowkey.cli.app import main as run

    run()
