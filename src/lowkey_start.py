"""What the command `lowkey` begins with: how threads wait is settled before torch is loaded, since OpenMP
reads it only then.
"""

import os


def main() -> None:
    """Threads that wait for others sleep instead of spinning, unless the environment says otherwise.

    A spinning thread keeps a core from the very thread that it waits for, whenever another program wants a
    core too: on two cores beside one busy program a matrix product took 100 times as long with two threads as
    with one. Asleep they cost nothing that can be measured.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from lowkey.cli.app import main as run

    run()
