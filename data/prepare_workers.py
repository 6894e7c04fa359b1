"""The worker processes of prepare.py: batches in, what an encoder makes of each out, in order."""

import contextlib
import multiprocessing
import signal


def serve(pipe, encoder):
    """A worker process: a batch in, its tokens (or the exception) out, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            try:
                result = encoder(pipe.recv())
            except EOFError:
                raise
            except Exception as error:
                result = error
            pipe.send(result)


def ordered_map(batches, workers, encoder):
    """encoder over the batches, in order; it must pickle. Worker k has batches k, k + workers, ...: one in progress each,
    so memory stays bounded, and pipes without threads, so that nothing can hang when a worker dies or Ctrl-C
    comes."""
    if workers == 1:
        yield from map(encoder, batches)
        return
    context = multiprocessing.get_context("spawn")  # not forked: a reader may have threads
    pipes, processes, sent = [], [], 0
    try:
        for batch in batches:
            if sent < workers:
                pipe, theirs = context.Pipe()
                process = context.Process(target=serve, args=(theirs, encoder), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                pipes.append(pipe)
            else:
                yield received(pipes[sent % workers])
            pipes[sent % workers].send(batch)
            sent += 1
        for i in range(max(0, sent - workers), sent):
            yield received(pipes[i % workers])
    except (EOFError, ConnectionError):
        raise OSError("a tokenizing process died (out of memory?); try fewer --workers") from None
    finally:
        for process in processes:
            process.kill()


def received(pipe):
    result = pipe.recv()
    if isinstance(result, Exception):
        raise result
    return result
