"""A machine for the PTX that Triton makes, in NumPy: several programs at once, in no order, with a weak memory.

Enough of PTX for this project's kernels; any other instruction is an error that names it. Tensors on the CPU are the
device's memory, at their own addresses, and an access outside them, or not aligned to its size, is an error.

What a warp stores is seen by that warp at once, by its program after a barrier, and by other programs after a release
by a warp of that program, or when the launch is over. A plain load may see what its multiprocessor's first cache holds
of an earlier time, until a warp there acquires; `.cg` looks past it. Every operation rounds by itself.

A clock counts round trips to global memory that wait for each other. All programs start at 0. Between labels, branches,
barriers and atomics, instructions are taken as perfectly scheduled: each issues as soon as its registers are ready; a
global load is ready one trip later, all else at once. A warp goes on from there when the last of them has issued, so it
has waited for what was used, and not for what was only loaded. An atomic takes a trip from when it and those before it
on its word have set out, and one that releases sets out a trip after the last store. Caches, bandwidth and how many
atomics one word can take count for nothing.
"""

import ctypes
import math
import random
from bisect import bisect_right

import numpy as np
from ptx_values import WARP, MachineError, unsigned

# bytes of a line of the first cache
LINE = 128


class Memory:
    """Bytes of tensors at their own addresses."""

    def __init__(self):
        self.bases, self.buffers, self.kept = [], [], []

    def add(self, tensor):
        storage = tensor.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
        if size and base not in self.bases:
            place = int(np.searchsorted(self.bases, base))
            self.bases.insert(place, base)
            self.buffers.insert(place, np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8))
            self.kept.append(tensor)

    def at(self, address, size):
        """The `size` bytes at an address, as a view."""
        place = bisect_right(self.bases, address) - 1
        offset = address - self.bases[place] if place >= 0 else -1
        if offset < 0 or offset + size > len(self.buffers[place]):
            raise MachineError(f"{size} bytes at {address:#x} are in no tensor")
        if address % size:
            raise MachineError(f"{size} bytes at {address:#x} are not aligned")
        return self.buffers[place][offset : offset + size]

    def line(self, address):
        """What there is of a cache line, by address."""
        first = address // LINE * LINE
        place = bisect_right(self.bases, address) - 1
        base, buffer = self.bases[place], self.buffers[place]
        low, high = max(first, base), min(first + LINE, base + len(buffer))
        return low, bytearray(buffer[low - base : high - base].tobytes())


class Clock:
    """When the instructions of one warp issue."""

    def __init__(self):
        self.now = self.latest = 0  # of what is scheduled together: the start, and the last issue so far
        self.ready = {}  # by register
        self.stored, self.stored_shared = -1, 0  # the last store

    def issue(self, instruction):
        time = self.now
        for source in instruction.sources:
            ready = self.ready.get(source, 0)
            if ready > time:
                time = ready
        if instruction.kind.endswith("shared"):
            time = max(time, self.stored_shared)
        if time > self.latest:
            self.latest = time
        return time

    def finish(self, instruction, time):
        """Its results are on their way."""
        if instruction.kind == "st global":
            self.stored = max(self.stored, time)
        elif instruction.kind in ("st shared", "stmatrix shared"):
            self.stored_shared = max(self.stored_shared, time)
        elif instruction.kind == "ld global":
            time += 1
        for target in instruction.targets:
            self.ready[target] = time

    def wait(self):
        """For everything that has been used so far."""
        self.now = self.latest

    @staticmethod
    def meet(clocks):
        """A barrier."""
        time, stored = max(c.latest for c in clocks), max(c.stored for c in clocks)
        for clock in clocks:
            clock.now = clock.latest = time
            clock.stored = stored


class Warp:
    """32 threads: registers, a place in the code for each, and stores that nobody else has seen."""

    def __init__(self, program, number):
        self.program, self.registers, self.stores, self.clock = program, {}, {}, Clock()
        self.alive, self.waits, self.over = np.ones(WARP, bool), False, False
        # the place of all lanes, or None where each has its own
        self.here, self.at = 0, np.zeros(WARP, int)
        self.special = {
            "%tid.x": np.arange(WARP * number, WARP * (number + 1), dtype="u4"),
            "%ctaid.x": np.full(WARP, program.number, "u4"),
        }

    def register(self, name, dtype):
        found = self.registers.get(name)
        if found is None:
            found = self.registers[name] = np.zeros(WARP, dtype)
        return found

    @property
    def can_run(self):
        return not self.waits and not self.over

    def next(self):
        """The lanes that are furthest behind and need not wait, and their place."""
        if self.here is not None:
            return self.here, self.alive
        kernel = self.program.launch.kernel
        for here in sorted(set(self.at[self.alive].tolist())):
            lanes = self.alive & (self.at == here)
            if not kernel.code[here].together or (lanes == self.alive).all():
                return here, lanes
        raise MachineError(f"lanes of a warp that wait for each other, some of them at {kernel.text[here]}")

    def go(self, lanes, place):
        if lanes is self.alive or (lanes == self.alive).all():
            self.here = place
        else:
            if self.here is not None:
                self.at[:] = self.here
            self.here = None
            self.at[lanes] = place

    def step(self):
        """The next instruction of some lanes."""
        launch = self.program.launch
        here, lanes = self.next()
        instruction = launch.kernel.code[here]
        self.go(lanes, here + 1)
        if instruction.is_first or instruction.is_atomic:
            self.clock.wait()
        time = self.clock.issue(instruction)
        run = instruction.run
        if isinstance(run, tuple) or instruction.is_atomic:
            self.clock.wait()
        if instruction.guard is not None:
            lanes = lanes & instruction.guard(self)
            if not lanes.any():
                return
        if instruction.kind in ("st global", "atom global", "red global"):
            self.program.stored_first = min(self.program.stored_first, time)
        if not isinstance(run, tuple):
            self.clock.finish(instruction, time)
            try:
                run(self, lanes)
            except MachineError as error:
                raise MachineError(f"{error} in {launch.kernel.text[here]}") from None
            return
        what, label = run
        if what == "branch":
            self.go(lanes, launch.kernel.labels[label])
        elif what == "exit":
            self.alive = self.alive & ~lanes
            self.over = not self.alive.any()
        else:
            self.waits = True

    # memory

    def strong(self, address, size):
        """The memory itself; every first cache forgets what it has of it."""
        self.pending(address, size)
        # what this warp has stored there comes first
        for stores in (self.program.stores, self.stores):
            if address in stores:
                self.program.publish({address: stores.pop(address)})
        for cache in self.program.launch.caches:
            cache.pop(address // LINE, None)
        return self.program.launch.memory.at(address, size)

    def pending(self, address, size):
        for stores in (self.stores, self.program.stores):
            if address in stores:
                if stores[address][0] != size:
                    raise MachineError(f"{size} bytes at {address:#x}, of which {stores[address][0]} were stored")
                return stores[address][1]
        return None

    def read(self, address, size):
        value = self.pending(address, size)
        return (
            int.from_bytes(self.program.launch.memory.at(address, size).tobytes(), "little") if value is None else value
        )

    def read_cached(self, address, size):
        value = self.pending(address, size)
        if value is not None:
            return value
        launch, cache = self.program.launch, self.program.cache
        launch.memory.at(address, size)
        if address // LINE not in cache:
            cache[address // LINE] = launch.memory.line(address)
        first, line = cache[address // LINE]
        if not 0 <= address - first <= len(line) - size:
            return self.read(address, size)
        return int.from_bytes(line[address - first : address - first + size], "little")

    def write(self, address, size, value):
        self.program.launch.memory.at(address, size)
        self.program.stores.pop(address, None)
        self.stores[address] = (size, value)

    def read_shared(self, address, size):
        return int.from_bytes(self.program.shared[address : address + size].tobytes(), "little")

    def write_shared(self, address, size, value):
        self.program.shared[address : address + size].view(unsigned(size))[0] = value

    def order(self, addresses, releases, acquires, targets):
        """The time of an atomic: it is on its way when stores are over, if it releases, and there after the others."""
        clock, words = self.clock, self.program.launch.words
        if releases:
            clock.now = max(clock.now, clock.stored + 1)
        for address in addresses:
            words[address] = max(words.get(address, 0), clock.now)
        ready = max(words[address] for address in addresses) + 1
        for target in targets:
            clock.ready[target] = ready
        clock.latest = clock.now = ready if acquires else clock.now

    def release(self):
        self.program.publish(self.stores)
        self.program.publish(self.program.stores)

    def acquire(self):
        self.program.cache.clear()


class Program:
    """Warps with a shared memory, on one multiprocessor."""

    def __init__(self, launch, number, shared):
        self.launch, self.number, self.stores, self.stored_first = launch, number, {}, math.inf
        self.shared, self.cache = np.full(shared, 0xCD, np.uint8), launch.rng.choice(launch.caches)
        self.warps = [Warp(self, i) for i in range(launch.kernel.threads // WARP)]

    def at_shared(self, address, size):
        return self.shared[address : address + size]

    def time(self):
        """Of the warp that is furthest behind of those that can go on."""
        return min((warp.clock.latest for warp in self.warps if warp.can_run), default=-1)

    def publish(self, stores):
        """Put stores into memory, and into this multiprocessor's first cache where that has their line."""
        for address, (size, value) in stores.items():
            self.launch.memory.at(address, size).view(unsigned(size))[0] = value
            if address // LINE in self.cache:
                first, line = self.cache[address // LINE]
                if 0 <= address - first <= len(line) - size:
                    line[address - first : address - first + size] = value.to_bytes(size, "little")
        stores.clear()

    def open_barrier(self):
        """Let the warps go on if all have come."""
        if all(warp.waits or warp.over for warp in self.warps):
            waiting = [warp.clock for warp in self.warps if warp.waits]
            if waiting:
                Clock.meet(waiting)
            for warp in self.warps:
                self.stores.update(warp.stores)
                warp.stores.clear()
                warp.waits = False


class Launch:
    """One run of a kernel.

    Args:
        kernel: an `Assembler`.
        arguments: tensors, in the order of the parameters.
        tensors: all others that the kernel reaches by addresses in tables.
        shared: bytes of shared memory.
        resident: how many programs run at a time, on two multiprocessors.
        seed: of their order.
        by_time: all programs run, the one that is furthest behind by the clock first: for its times to be right.

    Attributes:
        finished: the time at which the last program is over, in round trips.
        summed: that at which the last program has begun to store.
    """

    def __init__(self, kernel, programs, arguments, tensors, shared, *, resident=4, seed=0, burst=12, by_time=False):
        self.kernel, self.rng, self.memory, self.caches = kernel, random.Random(seed), Memory(), [{}, {}]
        self.finished = self.summed = 0
        self.words = {}  # of atomics: when the last one set out
        for tensor in (*arguments, *tensors):
            self.memory.add(tensor)
        addresses = [a.data_ptr() for a in arguments]
        # the compiler's own scratch pointers come last and are not used
        addresses += [0] * (len(kernel.parameters) - len(addresses))
        self.arguments = dict(zip(kernel.parameters, addresses, strict=True))
        self.shared, self.resident, self.burst = max(shared, 16), programs if by_time else resident, burst
        self.by_time = by_time
        with np.errstate(all="ignore"):
            self.run(programs)

    def run(self, programs):
        waiting = list(range(programs))
        self.rng.shuffle(waiting)
        running, over = [], []
        while waiting or running:
            while waiting and len(running) < self.resident:
                running.append(Program(self, waiting.pop(), self.shared))
            program = min(running, key=Program.time) if self.by_time else self.rng.choice(running)
            able = [warp for warp in program.warps if warp.can_run]
            if able:
                warp = min(able, key=lambda warp: warp.clock.latest) if self.by_time else self.rng.choice(able)
                begin = warp.clock.latest
                for _ in range(self.rng.randint(1, self.burst)):
                    if not warp.can_run or (self.by_time and warp.clock.latest > begin):
                        break
                    warp.step()
            program.open_barrier()
            if all(warp.over for warp in program.warps):
                running.remove(program)
                over.append(program)
                self.finished = max(self.finished, *(warp.clock.latest for warp in program.warps), 0)
                if program.stored_first < math.inf:
                    self.summed = max(self.summed, program.stored_first)
                for warp in program.warps:
                    warp.registers.clear()
                    warp.clock.ready.clear()
        self.rng.shuffle(over)
        for program in over:
            for warp in program.warps:
                program.publish(warp.stores)
            program.publish(program.stores)
