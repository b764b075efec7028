"""What a program here owes to the process that runs it, a notebook's perhaps: messages
that end nothing, files that are whole, signals and settings as they were."""
import os
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from functools import partial

import torch


def say(message, file=None):
    """Print a line. A full disk, a closed pipe or a missing letter ends nothing."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    message = message.encode(encoding, "backslashreplace").decode(encoding)
    with suppress(OSError, ValueError, AttributeError):     # also closed, or None
        print(message, file=file, flush=True)


def warn(message):
    """One line on stderr."""
    say(" ".join(message.split()), sys.stderr)


def fail(message, code=2):
    """End the program with one line on stderr."""
    warn(message)
    sys.exit(code)


def write_file(path, data):
    """Replace a file by these bytes, or on an OSError, which names it, leave it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the process's number, as another one may be writing the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_room(path, size):
    """OSError, which names path, unless so many bytes can be written beside it."""
    trial = path.with_name(path.name + ".room")
    try:
        write_file(trial, bytes(size))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    trial.unlink()


def could_write(write, *args):
    """Whether write(*args) worked; an OSError is a line on stderr."""
    try:
        write(*args)
    except OSError as error:
        warn(f"cannot write: {error}; tried again later")
        return False
    return True


def write_or_wait(stop, write, *args):
    """Try write(*args) until it works, or until one more signal is in the list stop."""
    signals = len(stop)
    while not could_write(write, *args) and len(stop) == signals:
        time.sleep(10)


@contextmanager
def signals_wait():
    """Yield a list to which Ctrl-C and SIGTERM append their number, and do no more."""
    stop, before = [], {}
    try:
        for name in (signal.SIGINT, signal.SIGTERM):
            before[name] = signal.signal(name, partial(_remember, stop))
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _remember(stop, number, frame):
    stop.append(number)


@contextmanager
def settings():
    """Settings of torch and Python for a program's time; afterwards all is as it was."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    dtype = torch.get_default_dtype()
    deterministic, cudnn_sdp = cudnn.deterministic, cuda.cudnn_sdp_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        # On a GPU, too, the same seed is to give the same samples.
        cudnn.deterministic = True
        cuda.enable_cudnn_sdp(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # torch warns of foreign checkpoints
            yield
    finally:
        torch.set_default_dtype(dtype)
        cudnn.deterministic = deterministic
        cuda.enable_cudnn_sdp(cudnn_sdp)


@contextmanager
def errors_in_one_line(if_memory_is_full):
    """What a user can cause ends the program with one line, and with exit code 2 (130
    for Ctrl-C). if_memory_is_full: what to do then."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        fail(f"cannot write: {error}")
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch has a RuntimeError of its allocator, on CUDA a subclass.
        if not isinstance(error, MemoryError) and "alloc" not in str(error).lower():
            raise
        fail(f"memory is full: {if_memory_is_full}")


def run_as_process(main):
    """main() of a script: a standard output that is lost is exit code 2, at the end."""
    try:
        main()
    finally:
        try:
            print(end="", flush=True)
        except OSError as error:
            sys.stdout = None                   # or Python writes to it once more
            fail(f"standard output: {error}")
