"""The command behind script/fleet: a Ray of its own on this machine, and the fleet on it."""

import argparse
import os
import signal
import sys
import tempfile

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> int:
    """Serve until a signal ends it; the exit status is 1 if no fleet could be started."""
    chosen = arguments()
    # Imported here: it takes seconds, which a wrong option need not wait for.
    import ray.serve

    from replicas.app import Settings, build

    threads = max(1, len(os.sched_getaffinity(0)) // chosen.replicas)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(prefix="fleet-", ignore_cleanup_errors=True) as directory:
        ray.init(address="local", include_dashboard=False, _temp_dir=directory)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        try:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            if 0 < gpus < chosen.replicas:
                wrong = f"--replicas {chosen.replicas}: expected at most {gpus}, one for each GPU"
                sys.exit(f"script/fleet: {wrong}")
            ray.serve.start(http_options={"host": chosen.host, "port": chosen.port})
            settings = Settings(replicas=chosen.replicas, queue=chosen.queue, gpus=min(gpus, 1))
            ray.serve.run(build(settings), name="flux")
            print(f"script/fleet: ready at port {chosen.port}", flush=True)
            while True:
                signal.pause()
        except RuntimeError as error:  # of Ray: the last line says what, the log has the rest
            sys.exit(f"script/fleet: {str(error).splitlines()[-1]}; see the log above")
        finally:
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            ray.serve.shutdown()
            ray.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="script/fleet", description=__doc__)
    add = parser.add_argument
    add("--replicas", type=positive, default=2, metavar="N", help="default: 2")
    add("--port", type=positive, default=5000, metavar="P", help="default: 5000")
    add("--host", default="127.0.0.1", help="to listen on; default: 127.0.0.1")
    add("--queue", type=positive, default=100, metavar="N", help="requests that may wait")
    return parser.parse_args()


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
