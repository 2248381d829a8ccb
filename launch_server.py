"""`python -m ramet.launch_server`: the same command as `launch_server` and `ramet serve`."""

from ramet.launch.cli import launch_server

if __name__ == "__main__":
    launch_server()
