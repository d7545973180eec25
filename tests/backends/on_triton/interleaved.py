"""The programs of a launch in any order, in Triton's interpreter."""

import threading

import numpy as np
from triton.runtime import interpreter


class Interleaved:
    """Runs the programs of a launch as threads, one at a time, with a change at random loads, stores and atomics.

    In the place of Triton's `GridExecutor`. Without changes, it runs whole programs in a random order.
    """

    def __init__(self, rng, change):
        self.rng, self.change = rng, change

    def launch(self, kernel, grid, args, meta):
        builder = interpreter.interpreter_builder
        builder.set_grid_dim(*grid, 1, 1)
        plain = {
            name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
        }
        patched = interpreter._patch_lang(kernel.fn)
        values = {name: interpreter._implicit_cvt(arg) for name, arg in zip(kernel.arg_names, args, strict=False)}
        for name, function in plain.items():
            setattr(builder, name, self.interrupted(function))
        self.turns = [threading.Semaphore(0) for _ in range(grid[0])]
        self.waiting, self.failed, self.over = list(range(grid[0])), [], threading.Semaphore(0)
        threads = [threading.Thread(target=self.run, args=(i, kernel.fn, {**values, **meta})) for i in self.waiting]
        try:
            for thread in threads:
                thread.start()
            self.resume()
            self.over.acquire()
            for thread in threads:
                thread.join()
        finally:
            for name in plain:
                delattr(builder, name)
            patched.restore()
        if self.failed:
            raise self.failed[0]

    def resume(self):
        if not self.waiting:
            self.over.release()
            return
        self.running = self.waiting.pop(self.rng.randrange(len(self.waiting)))
        interpreter.interpreter_builder.grid_idx = (self.running, 0, 0)
        self.turns[self.running].release()

    def run(self, i, function, arguments):
        self.turns[i].acquire()
        try:
            with np.errstate(all="ignore"):
                function(**arguments)
        except Exception as error:
            self.failed.append(error)
        self.resume()

    def interrupted(self, function):
        def call(*args):
            if self.rng.random() < self.change:
                me = self.running
                self.waiting.append(me)
                self.resume()
                self.turns[me].acquire()
            return function(*args)

        return call
