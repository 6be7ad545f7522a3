"""The programs that tests start in a warm Python end as those of a cold one do."""

import signal
import subprocess

import warm

UNMOVED = """
import signal, time
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(0.05)
raise SystemExit(3)
"""


def test_signals_up_to_the_last_moment_leave_the_exit_code():
    """As those of a launcher whose other process has failed."""
    with subprocess.Popen(
        [warm.python(), "-c", UNMOVED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        started.stdout.readline()
        while started.poll() is None:
            started.send_signal(signal.SIGUSR1)
        assert started.stderr.read() == ""
    assert started.returncode == 3
