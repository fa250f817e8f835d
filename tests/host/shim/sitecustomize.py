"""Puts the CPU shim into every Python process of a host test, FastDeploy's children included."""

import os

if os.environ.get("FD_MINICPM41_TEST_CPU_HOST") == "1":
    import cpu_host

    cpu_host.install()
