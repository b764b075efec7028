"""What a program here owes to the process that runs it, a notebook's perhaps: messages
that end nothing, files that are whole, signals and settings as they were."""
import os
import signal
import sys
import threading
import time
import uuid
import warnings
import zlib
from contextlib import contextmanager, suppress
from functools import partial

import torch


_lost = []              # what was raised by printing to standard output


def say(message, file=None):
    """Print a line. A full disk, a closed pipe or a missing letter ends nothing."""
    file = file or sys.stdout
    if file is None:
        _lost.append(OSError("closed"))
        return
    encoding = getattr(file, "encoding", None) or "utf-8"
    message = message.encode(encoding, "backslashreplace").decode(encoding)
    try:
        print(message, file=file, flush=True)
    except (OSError, ValueError) as error:          # ValueError: closed
        if file is sys.stdout:
            _lost.append(error)


def warn(message):
    """One line on stderr, if there is one."""
    if sys.stderr is not None:
        say(" ".join(message.split()), sys.stderr)


def fail(message, code=2):
    """End the program with one line on stderr."""
    warn(message)
    sys.exit(code)


def progress(run, loss, start, begin):
    """What to say of a training run; begin: perf_counter and process_time of module
    time when it was at the step `start`."""
    total, batch_size = run.config["total"], run.config["batch_size"]
    seconds = time.perf_counter() - begin[0]
    cores = (time.process_time() - begin[1]) / seconds
    rate = (run.step - start) / seconds
    line = (f"epoch {run.step * batch_size / run.config['N']:.2f}  "
            f"step {run.step}/{total}  loss {loss:.4f}  "
            f"{rate * batch_size:.0f} images/s  {seconds:.0f} s, "
            f"{(total - run.step) / rate:.0f} s left")
    # Beside another busy program threads mostly wait for each other.
    threads = torch.get_num_threads()
    if run.device.type == "cpu" and threads > 1 and cores < 0.75 * threads:
        line += (f"\n{threads} threads on {cores:.1f} cores: --resume with "
                 "OMP_NUM_THREADS=1 may be quicker")
    return line


def write_file(path, data):
    """Replace a file by these bytes, or on an OSError, which names it, leave it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own, as another program may be writing the same file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())     # a power cut leaves the old file or the new
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def checksum(path):
    """Of the file's content, an int."""
    return zlib.crc32(path.read_bytes())


def keep(path, step):
    """Copy path to model-STEP.pt beside it, or another name that is free."""
    kept, n = path.with_name(f"model-{step}.pt"), 1
    while kept.exists():
        n += 1
        kept = path.with_name(f"model-{step}-{n}.pt")
    write_file(kept, path.read_bytes())
    say(f"kept {path} as {kept}")


def check_room(path, size):
    """OSError, which names path, unless so many bytes can be written beside it."""
    trial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        write_file(trial, bytes(size))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        trial.unlink(missing_ok=True)


def could_write(write, *args):
    """Whether write(*args) worked; an OSError is a line on stderr."""
    try:
        write(*args)
    except OSError as error:
        warn(f"cannot write: {error}")
        return False
    return True


def write_or_wait(stop, write, *args):
    """Try write(*args) until it works, or until one more signal is in the list stop.
    Whether it worked."""
    signals = len(stop)
    while not could_write(write, *args):
        if len(stop) > signals:
            return False
        time.sleep(10)
    return True


def choose_device(name):
    """The torch.device of an option; auto is CUDA, and what is not there is the CPU."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        warn(f"no {name} here, so the CPU")
        name = "cpu"
    return torch.device(name)


@contextmanager
def signals_wait():
    """Yield a list to which Ctrl-C and SIGTERM append their number, and do no more."""
    stop, before = [], {}
    try:
        # Python gives signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                before[name] = signal.signal(name, partial(_remember, stop))
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)


def _remember(stop, number, frame):
    stop.append(number)


@contextmanager
def settings():
    """Settings of torch and Python for a program's time; then all is as it was."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    deterministic, cudnn_sdp = cudnn.deterministic, cuda.cudnn_sdp_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        if device.type != "cpu":
            torch.set_default_device("cpu")
        # On a GPU, too, the same seed is to give the same samples.
        cudnn.deterministic = True
        cuda.enable_cudnn_sdp(False)
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")     # torch warns of foreign checkpoints
            yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)
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
        fail(f"cannot read or write: {error}")
    except (MemoryError, RuntimeError) as error:
        # torch has a RuntimeError for a full CPU, and two kinds for a full GPU.
        text = str(error).lower()
        full = "out of memory" in text or "allocat" in text
        if not full and not isinstance(error, MemoryError):
            raise
        fail(f"memory is full: {if_memory_is_full}")


def run_as_process(main):
    """main() of a script: SIGTERM is exit code 143, and files are tidied up; a standard
    output that is lost is exit code 2, at the end."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    finally:
        try:
            print(end="", flush=True)
        except OSError as error:
            _lost.append(error)
        if _lost:
            sys.stdout = None                   # or Python writes to it once more
    if _lost:
        fail(f"standard output: {_lost[0]}")


def _terminate(number, frame):
    sys.exit(128 + number)
