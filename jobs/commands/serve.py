"""`moray serve`: start Ray, Ray Serve and the endpoint on this machine, and stop them at the end."""

import signal
import socket
import sys
import time
from collections.abc import Sequence
from ipaddress import ip_address
from threading import Event

from moray.batch.plan.model_fit import explain_misfits, fit_gpu
from moray.batch.plan.model_info import ModelInfo, read_config, read_model_info
from moray.batch.runtime.ray_choice import choose_ray
from moray.batch.runtime.ray_session import ray_session
from moray.batch.runtime.ray_watch import RayWatchByThread
from moray.batch.runtime.signals import catch_signals
from moray.batch.runtime.startup_timeout import NOTE_S
from moray.engine.checkpoint.model_source import ModelSource
from moray.engine.config import ModelConfig
from moray.engine.errors import NodeError, Problem, SettingsError, UserError
from moray.engine.partition import find_split_problems
from moray.engine.settings.reader import read_settings
from moray.jobs.batches.store import BatchStore
from moray.jobs.doctor.gpu import working_driver
from moray.serve.args import EndpointArgs
from moray.serve.keys import ENVIRONMENT, Keys

POLL_S = 0.1  # between two looks at whether the endpoint is up


def read_args(model: str, dtype: str, overrides: Sequence[str], batches: str | None = None) -> EndpointArgs:
    """Make the endpoint's arguments from the options; `--set` is read as for a job.

    batches: the store of the Batch API, batch_store

    Raises SettingsError with every mistake.
    """
    given = {"model": model, "dtype": dtype} | ({} if batches is None else {"batch_store": batches})
    return read_settings(EndpointArgs, given, overrides, example="max_waiting=64")


def run_endpoint(args: EndpointArgs, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; then accept nothing new, finish what runs, and return.

    A second signal ends the process at once. Raises SystemExit with 128 + the signal's number for it, and where the
    first signal came before the endpoint was up. Raises UserError for what is wrong with the model, the GPU, the keys,
    the port or RAY_ADDRESS, before Ray is started.
    """
    stop_signal = StopSignal()
    with catch_signals(stop_signal.on_signal):
        model = ModelSource(args.model)
        config = read_config(model, args.quantization, args.chosen_kv_cache_dtype)
        if problems := list(find_split_problems(config, args.num_ranks, expert_parallel=args.expert_parallel)):
            raise SettingsError([Problem(found.path.removeprefix("engine."), found.message) for found in problems])
        check_gpu(args, config, read_model_info(model, config, args.dtype))
        audience = _check_keys(args, host)
        _check_port(host, port)
        if args.batch_store is not None:
            BatchStore(args.batch_store).prepare()
        choice = choose_ray()
        if choice.address is not None and args.max_replicas > 1:
            raise UserError(
                f"max_replicas is {args.max_replicas}: on a cluster (RAY_ADDRESS is {choice.address}) moray serve runs "
                "one replica, on this machine. For several deploy moray.jobs.app:build there with serve deploy."
            )
        print("\n".join(filter(None, [f"Loading {args.model}", choice.remark])), flush=True)
        if not stop_signal.wait(0):
            watch = RayWatchByThread(stop_signal.on_ray_loss)
            with ray_session(choice, on_report=stop_signal.report, watch=watch):
                try:
                    if _serve(args, host, port, stop_signal, audience, owns_ray=choice.address is None):
                        return
                finally:
                    watch.stop()
        print("Stopped before the endpoint was up", flush=True)
        sys.exit(stop_signal.exit_code)


def _serve(
    args: EndpointArgs, host: str, port: int, stop_signal: "StopSignal", audience: str, *, owns_ray: bool
) -> bool:
    """Serve until a signal comes; return False where it came before the endpoint was up.

    Raises JobError where the endpoint does not start.
    """
    from moray.jobs.commands.serve_application import ServeApplication

    if stop_signal.wait(0):
        return False
    application = ServeApplication(owns_ray=owns_ray)
    try:
        application.start(args, host, port)
        is_served = application.is_running()
        explain_at_s, told = time.monotonic() + NOTE_S, None
        while not is_served and not stop_signal.wait(POLL_S):
            is_served = application.is_running()
            if not is_served and time.monotonic() > explain_at_s:
                explain_at_s = time.monotonic() + NOTE_S
                if (waiting := application.explain_wait()) not in (None, told):
                    print(waiting, flush=True)
                    told = waiting
        if is_served:
            print(f"{args.model_name} is served at http://{host}:{port} ({audience}). Ctrl-C stops it.", flush=True)
            stop_signal.wait()
            print("Finishing what runs; a second signal ends at once", flush=True)
    except BaseException as error:
        if not owns_ray:  # a Ray of our own ends with the session, and the application with it
            application.stop(waits=not isinstance(error, SystemExit))  # a second signal raises SystemExit
        raise
    if is_served or not owns_ray:
        application.stop()
    return is_served


class StopSignal:
    """Records the first signal, which stops the endpoint in good order; a second one ends the process.

    exit_code:  exit code of a process that the signal ended; 0 before it came
    """

    def __init__(self) -> None:
        self._ended = Event()
        self.exit_code = 0

    def report(self, text: str) -> None:
        """Print a message about Ray's daemons, unless the end has begun, when they only report that they end."""
        if not self._ended.is_set():
            print(text, flush=True)

    def on_ray_loss(self, process: str) -> int:
        """Print that a process of Ray died; return the exit code of this one, which ends with it."""
        print(f"Ray's {process} died, and the endpoint with it", flush=True)
        return self.exit_code or 1

    def wait(self, seconds: float | None = None) -> bool:
        """Wait for the signal, at most `seconds` (None = for ever), and return whether it has come."""
        return self._ended.wait(seconds)

    def on_signal(self, name: str) -> None:
        """Record the first signal. Raises SystemExit for a second one."""
        code = 128 + signal.Signals[name]
        if self._ended.is_set():
            sys.exit(code)
        self.exit_code = code
        self._ended.set()


def check_gpu(args: EndpointArgs, model: ModelConfig, info: ModelInfo) -> None:
    """Raise NodeError where GPUs of this machine will be used and the model fits none, by the rule of a job.

    A GPU that is missing is reported by the replica, which knows why.
    """
    driver = None if args.device == "cpu" else working_driver()
    if driver is None:
        return
    if args.num_ranks > len(driver.gpus):
        raise NodeError(
            f"tensor_parallel is {args.num_ranks}, and each rank needs a GPU of its own; this machine has "
            f"{len(driver.gpus)}. Lower it, or set device=cpu."
        )
    share = args.num_gpus if 0 < args.num_gpus < 1 else 1.0
    engine = args.engine_config(num_threads=1)
    fits = [fit_gpu(gpu.name, gpu.capability, gpu.total_bytes, engine, model, info, share=share) for gpu in driver.gpus]
    if not any(fit.fits for fit in fits):
        raise NodeError(f"{explain_misfits(fits, share)}; or set device=cpu")


def _check_keys(args: EndpointArgs, host: str) -> str:
    """Return whom the endpoint serves, in words. Raises UserError where any machine could use it without a key and
    is_public does not allow that."""
    try:
        has_keys = Keys(args.keys_file).are_configured
    except OSError as error:
        raise UserError(f"keys_file: {error}") from None
    if has_keys:
        return "to clients with a key"
    if args.is_public:
        return "to everybody: no keys are configured"
    if host == "localhost" or _is_loopback(host):
        return "to this machine only: no keys are configured, Authorization headers are ignored"
    raise UserError(
        f"host is {host} and no keys are configured, so anybody could use the endpoint. Set keys_file or "
        f"{ENVIRONMENT}, or is_public=true if that is meant, or listen on 127.0.0.1."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port or --host.") from None
