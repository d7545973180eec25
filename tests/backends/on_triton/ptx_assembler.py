"""A PTX kernel's text as functions of a warp and the lanes that run, for `ptx_machine`."""

import re
from typing import NamedTuple

import numpy as np
from ptx_values import (
    ATOMIC,
    COMPARISONS,
    ELEMENTWISE,
    REDUCTIONS,
    ROUNDINGS,
    TYPES,
    WARP,
    MachineError,
    bits_of,
    highest,
    shifted,
    unsigned,
    wide_product,
)

REGISTERS = {"p": np.dtype(bool), "rs": np.dtype("u2"), "r": np.dtype("u4"), "rd": np.dtype("u8")}
# what all lanes of a warp do at once; those that come first wait
TOGETHER = ("bar", "shfl", "vote", "redux", "ldmatrix", "stmatrix")


def operands(text):
    """`a, {b, c}, [d + 4]` as a list."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def listed(text):
    """`{b, c}` as a list, and anything else as a list of itself."""
    return [part.strip() for part in text.strip("{} ").split(",")]


class Instruction(NamedTuple):
    """What the machine does with one, and what its clock needs to know."""

    guard: object  # a function of a warp, or None
    run: object  # a function of a warp and the lanes that run, or what changes their course
    together: bool
    kind: str  # name and memory: "ld global"
    sources: tuple[str, ...]  # registers
    targets: tuple[str, ...]
    is_first: bool  # of what is scheduled together
    is_atomic: bool

    @classmethod
    def of(cls, guard, run, name, suffixes, arguments, is_first, guard_text):
        place = next((s.split("::")[0] for s in suffixes if s.startswith(("global", "shared"))), "")
        has_target = name not in ("st", "red", "bra", "bar", "ret")
        texts = arguments[:has_target], (guard_text or "", *arguments[has_target:])
        targets, sources = (tuple(dict.fromkeys(re.findall(r"%[a-z]+\d+", " ".join(t)))) for t in texts)
        return cls(guard, run, name in TOGETHER, f"{name} {place}", sources, targets, is_first, name in ("atom", "red"))


class Assembler:
    """One kernel's text as functions of a warp and the lanes that run."""

    def __init__(self, ptx):
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", ptx, flags=re.S)
        entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*)\}", text, re.S)
        self.parameters = re.findall(r"(\w+_param_\d+)", entry[2])
        self.threads = int(re.search(r"\.reqntid\s+(\d+)", entry[3])[1])
        self.shared = set(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]", text))
        self.labels, self.code, self.text = {}, [], []
        # directives, and the braces round what was written by hand
        body = re.sub(r"^\s*(\.(loc|file|pragma|reg|section)[^\n]*|[{}])\s*$", "", entry[4], flags=re.M)
        for statement in re.split(r";|(?<=:)\s", body):
            statement = " ".join(statement.split())
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.text)
            elif statement and not statement.startswith("."):
                self.text.append(statement)
        # what is jumped to; other labels are for debuggers
        jumps = (re.search(r"\bbra(?:\.uni)?\s+(\S+)$", statement) for statement in self.text)
        firsts = {self.labels[jump[1]] for jump in jumps if jump}
        self.code = [self.instruction(statement, i in firsts) for i, statement in enumerate(self.text)]

    def instruction(self, statement, is_first):
        guard, opcode, rest = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", statement).groups()
        name, *suffixes = opcode.split(".")
        make = getattr(self, f"make_{name}", None)
        arguments = operands(rest)
        if make is None and name not in ELEMENTWISE:
            raise MachineError(f"unknown instruction: {statement}")
        try:
            run = make(suffixes, arguments) if make else self.elementwise(name, suffixes, arguments)
        except KeyError as error:
            raise MachineError(f"unknown instruction, by {error}: {statement}") from None
        predicate = self.value(guard, TYPES["pred"]) if guard else None
        return Instruction.of(predicate, run, name, suffixes, arguments, is_first, guard)

    def value(self, text, dtype):
        """A function of a warp: the operand in all its lanes."""
        if text.startswith("!"):
            inner = self.value(text[1:], dtype)
            return lambda warp: ~inner(warp)
        if text in ("%tid.x", "%ctaid.x"):
            return lambda warp: warp.special[text].view(dtype)
        if text.startswith("%"):
            own = REGISTERS[re.match(r"%([a-z]+)", text)[1]]
            if own == dtype:
                return lambda warp: warp.register(text, own)
            if own.itemsize == dtype.itemsize:
                return lambda warp: warp.register(text, own).view(dtype)
            # a wider register is cut
            return lambda warp: warp.register(text, own).astype(unsigned(dtype.itemsize)).view(dtype)
        if text in self.shared:
            constant = 0
        elif re.match(r"0[fF]", text):
            constant = np.array([int(text[2:], 16)], "u4").view("f4")[0]
        elif re.match(r"0[dD]", text):
            constant = np.array([int(text[2:], 16)], "u8").view("f8")[0]
        else:
            constant = int(text, 0)
        if isinstance(constant, int) and dtype.kind in "iu":
            constant = np.array(constant & (2 ** (8 * dtype.itemsize) - 1), unsigned(dtype.itemsize)).view(dtype)
        elif not isinstance(constant, int) and dtype.kind in "iu":
            constant = constant.view(dtype)
        array = np.full(WARP, constant, dtype)
        return lambda warp: array

    def setter(self, text):
        """A function that puts a value, of any type of the register's size or a lesser one, into the lanes that run."""
        if text == "_":
            return lambda warp, lanes, value: None
        own = REGISTERS[re.match(r"%([a-z]+)", text)[1]]

        def put(warp, lanes, value):
            if own.kind == "b":
                bits = value.astype(bool)
            elif value.dtype.itemsize == own.itemsize:
                bits = value.view(own)
            else:
                # a narrow signed value is extended by its sign
                bits = value.astype(f"i{own.itemsize}").view(own) if value.dtype.kind == "i" else value.astype(own)
            np.copyto(warp.register(text, own), bits, where=lanes)

        return put

    def elementwise(self, name, suffixes, arguments):
        dtype, function = TYPES[suffixes[-1]], ELEMENTWISE[name]
        if name == "mov" and "{" in "".join(arguments):
            return self.repack(dtype, arguments)
        types = [dtype] * (len(arguments) - 1)
        if dtype.kind == "b":
            function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, "not": np.logical_not}.get(
                name, function
            )
        elif "wide" in suffixes:
            if name == "mad":
                types[2] = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
                function = lambda a, b, c: wide_product(a, b, dtype) + c  # noqa: E731
            else:
                function = lambda a, b: wide_product(a, b, dtype)  # noqa: E731
        elif "hi" in suffixes:
            function = lambda a, b: (wide_product(a, b, dtype) >> 8 * dtype.itemsize).astype(dtype)  # noqa: E731
        getters = [self.value(a, t) for a, t in zip(arguments[1:], types, strict=True)]
        put = self.setter(arguments[0])
        return lambda warp, lanes: put(warp, lanes, function(*(get(warp) for get in getters)))

    def repack(self, dtype, arguments):
        """mov between one register and the parts of it."""
        target, source = map(listed, arguments)
        part = unsigned(dtype.itemsize // max(len(target), len(source)))
        if len(target) > 1:
            get, puts = self.value(source[0], dtype), [self.setter(t) for t in target]

            def run(warp, lanes):
                parts = np.ascontiguousarray(get(warp)).view(part).reshape(WARP, -1)
                for i, put in enumerate(puts):
                    put(warp, lanes, parts[:, i].copy())
        else:
            gets, put = [self.value(s, part) for s in source], self.setter(target[0])

            def run(warp, lanes):
                parts = np.stack([get(warp) for get in gets], 1)
                put(warp, lanes, np.ascontiguousarray(parts).view(unsigned(dtype.itemsize)).reshape(WARP))

        return run

    def make_abs(self, suffixes, arguments):
        if suffixes[-1] != "f16x2":
            return self.elementwise("abs", suffixes, arguments)
        get, put = self.value(arguments[1], TYPES["b32"]), self.setter(arguments[0])
        return lambda warp, lanes: put(warp, lanes, get(warp) & np.uint32(0x7FFF7FFF))

    def make_shl(self, suffixes, arguments, left=True):
        dtype = TYPES[suffixes[-1]]
        get, amount, put = (
            self.value(arguments[1], dtype),
            self.value(arguments[2], TYPES["u32"]),
            self.setter(arguments[0]),
        )
        return lambda warp, lanes: put(warp, lanes, shifted(get(warp), amount(warp), left))

    def make_shr(self, suffixes, arguments):
        return self.make_shl(suffixes, arguments, left=False)

    def make_bfe(self, suffixes, arguments):
        gets, put = [self.value(a, TYPES["u32"]) for a in arguments[1:]], self.setter(arguments[0])

        def run(warp, lanes):
            value, first, length = (get(warp).astype("u8") for get in gets)
            put(warp, lanes, ((value >> first) & ((np.uint64(1) << length) - np.uint64(1))).astype("u4"))

        return run

    def make_popc(self, suffixes, arguments):
        return self.counted(suffixes, arguments, lambda x, dtype: bits_of(x).sum(1))

    def make_clz(self, suffixes, arguments):
        return self.counted(suffixes, arguments, lambda x, dtype: 8 * dtype.itemsize - 1 - highest(x, dtype))

    def make_bfind(self, suffixes, arguments):
        if "shiftamt" in suffixes:
            raise KeyError("shiftamt")
        return self.counted(suffixes, arguments, highest)

    def counted(self, suffixes, arguments, function):
        """A 32-bit number from the bits of a value."""
        dtype = TYPES[suffixes[-1]]
        get, put = self.value(arguments[1], dtype), self.setter(arguments[0])
        return lambda warp, lanes: put(warp, lanes, function(get(warp), dtype).astype("i4"))

    def make_prmt(self, suffixes, arguments):
        """Each byte of the result by four bits of the selector: one of the eight of both values, or its sign."""
        if suffixes != ["b32"]:
            raise KeyError(suffixes[-1])
        gets, put = [self.value(a, TYPES["u32"]) for a in arguments[1:]], self.setter(arguments[0])

        def run(warp, lanes):
            a, b, selector = (get(warp) for get in gets)
            source = np.stack([a, b], 1).view(np.uint8).reshape(WARP, 8)
            picks = selector[:, None] >> np.arange(0, 16, 4, dtype="u4") & 15
            byte = np.take_along_axis(source, (picks & 7).astype(int), 1)
            byte = np.where(picks & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint8)
            put(warp, lanes, np.ascontiguousarray(byte).view("u4").reshape(WARP))

        return run

    def make_lop3(self, suffixes, arguments):
        """Bit n of the table is the result for the bits a, b, c of n = 4 a + 2 b + c."""
        if suffixes != ["b32"]:
            raise KeyError(suffixes[0])
        gets, put = [self.value(a, TYPES["u32"]) for a in arguments[1:4]], self.setter(arguments[0])
        table = int(arguments[4], 0)

        def run(warp, lanes):
            values, result = [get(warp) for get in gets], np.zeros(WARP, "u4")
            for n in range(8):
                if table >> n & 1:
                    a, b, c = (x if n >> 2 - i & 1 else ~x for i, x in enumerate(values))
                    result |= a & b & c
            put(warp, lanes, result)

        return run

    def make_selp(self, suffixes, arguments):
        dtype = TYPES[suffixes[-1]]
        a, b = (self.value(text, dtype) for text in arguments[1:3])
        which, put = self.value(arguments[3], TYPES["pred"]), self.setter(arguments[0])
        return lambda warp, lanes: put(warp, lanes, np.where(which(warp), a(warp), b(warp)))

    def make_setp(self, suffixes, arguments):
        if len(suffixes) > 2 or "|" in arguments[0]:
            raise KeyError(".".join(suffixes))
        comparison, dtype = suffixes[0], TYPES[suffixes[-1]]
        a, b = (self.value(text, dtype) for text in arguments[1:3])
        put = self.setter(arguments[0])
        with_nan = dtype.kind == "f" and comparison[-1] == "u"
        compare = np.not_equal if comparison == "nan" else COMPARISONS[comparison[:-1] if with_nan else comparison]

        def run(warp, lanes):
            x, y = a(warp), b(warp)
            result = compare(x, y)
            if dtype.kind == "f":
                unordered = np.isnan(x) | np.isnan(y)
                result = unordered if comparison == "nan" else result | unordered if with_nan else result & ~unordered
            put(warp, lanes, result)

        return run

    def make_cvt(self, suffixes, arguments):
        target, source = (TYPES[s] for s in suffixes[-2:])
        for s in suffixes[:-2]:
            if s not in ("rn", *ROUNDINGS):
                raise KeyError(s)
        rounding = ROUNDINGS.get(suffixes[0])
        get, put = self.value(arguments[1], source), self.setter(arguments[0])

        def run(warp, lanes):
            x = get(warp)
            if rounding:
                x = rounding(x)
            if source.kind == "f" and target.kind in "iu":
                # out of range goes to the nearest, NaN to 0
                limits = np.iinfo(target)
                x = np.where(np.isnan(x), 0, np.clip(x.astype("f8"), float(limits.min), float(limits.max)))
                x = np.where(x >= float(limits.max), limits.max, np.minimum(x, 2.0**62).astype("i8"))
            put(warp, lanes, x.astype(target))

        return run

    def make_bra(self, suffixes, arguments):
        return ("branch", arguments[0])

    def make_ret(self, suffixes, arguments):
        return ("exit", None)

    def make_bar(self, suffixes, arguments):
        return ("barrier", None)

    def address(self, text, wide):
        base, offset = re.match(r"\[\s*([\w%$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        get, offset = self.value(base, TYPES["u64" if wide else "u32"]), int(offset or "0", 0)
        return lambda warp, lanes: [int(a) + offset for a in get(warp)[lanes]]

    def make_ld(self, suffixes, arguments):
        if suffixes[0] == "param":
            name, put = arguments[1].strip("[] "), self.setter(arguments[0])
            return lambda warp, lanes: put(warp, lanes, np.full(WARP, warp.program.launch.arguments[name], "u8"))
        if "nc" in suffixes or not {"global", "shared", "shared::cta"} & set(suffixes):
            raise MachineError(f"a load of this kind is not covered by an acquire: ld.{'.'.join(suffixes)}")
        dtype, targets = unsigned(TYPES[suffixes[-1]].itemsize), listed(arguments[0])
        size, puts = dtype.itemsize, [self.setter(t) for t in targets]
        address = self.address(arguments[1], "global" in suffixes)
        read = "read_shared" if "global" not in suffixes else "read" if {"cg", "cv"} & set(suffixes) else "read_cached"

        def run(warp, lanes):
            starts = address(warp, lanes)
            check_vector(starts, size * len(puts))
            for i, put in enumerate(puts):
                value = np.zeros(WARP, dtype)
                value[lanes] = [getattr(warp, read)(a + i * size, size) for a in starts]
                put(warp, lanes, value)

        return run

    def make_st(self, suffixes, arguments):
        dtype, sources = unsigned(TYPES[suffixes[-1]].itemsize), listed(arguments[1])
        size, gets = dtype.itemsize, [self.value(s, dtype) for s in sources]
        address = self.address(arguments[0], "global" in suffixes)
        write = "write" if "global" in suffixes else "write_shared"

        def run(warp, lanes):
            starts = address(warp, lanes)
            check_vector(starts, size * len(gets))
            for i, get in enumerate(gets):
                for a, value in zip(starts, get(warp)[lanes].tolist(), strict=True):
                    getattr(warp, write)(a + i * size, size, value)

        return run

    def make_atom(self, suffixes, arguments):
        function, dtype, is_global = ATOMIC[suffixes[-2]], TYPES[suffixes[-1]], "global" in suffixes
        if not is_global and not {"shared", "shared::cta"} & set(suffixes):
            raise KeyError(".".join(suffixes))
        releases = {"acq_rel", "release"} & set(suffixes)
        acquires = {"acq_rel", "acquire"} & set(suffixes)
        put, address = self.setter(arguments[0]), self.address(arguments[1], is_global)
        gets = [self.value(a, dtype) for a in arguments[2:]]
        registers = re.findall(r"%[a-z]+\d+", arguments[0])

        def run(warp, lanes):
            if is_global:
                warp.order(address(warp, lanes), releases, acquires, registers)
            if releases:
                warp.release()
            before, values = np.zeros(WARP, dtype), [get(warp) for get in gets]
            # lanes in any order, as the memory takes them
            which = np.flatnonzero(lanes)
            starts = dict(zip(which.tolist(), address(warp, lanes), strict=True))
            warp.program.launch.rng.shuffle(which)
            for lane in which.tolist():
                place = (warp.strong if is_global else warp.program.at_shared)(starts[lane], dtype.itemsize).view(dtype)
                before[lane] = place[0]
                place[0] = function(before[lane], *(x[lane] for x in values))
            if acquires:
                warp.acquire()
            put(warp, lanes, before)

        return run

    def make_red(self, suffixes, arguments):
        return self.make_atom(suffixes, ["_", *arguments])

    def make_shfl(self, suffixes, arguments):
        mode, (put, *puts) = suffixes[1], [self.setter(text) for text in arguments[0].split("|")]
        get, b, c = (self.value(a, TYPES["u32"]) for a in arguments[1:4])
        lane = np.arange(WARP)

        def run(warp, lanes):
            x, step, clamp = get(warp), b(warp).astype(int), c(warp).astype(int)
            segment = clamp >> 8 & 31
            last, first = lane & segment | clamp & 31 & ~segment, lane & segment
            if mode == "up":
                other = lane - step
                inside = other >= last
            else:
                other = {"bfly": lane ^ step, "down": lane + step, "idx": first | step & ~segment}[mode]
                inside = other <= last
            put(warp, lanes, x[np.where(inside, other, lane)])
            for put_inside in puts:
                put_inside(warp, lanes, inside)

        return run

    def make_vote(self, suffixes, arguments):
        """What the lanes say together, to all of them: a mask of those that say yes, or whether any or all do."""
        function = {
            "ballot": lambda yes, asked: sum(1 << i for i in np.flatnonzero(yes & asked).tolist()),
            "any": lambda yes, asked: (yes & asked).any(),
            "all": lambda yes, asked: (yes | ~asked).all(),
        }[suffixes[1]]
        put, get, members = (
            self.setter(arguments[0]),
            self.value(arguments[1], TYPES["pred"]),
            self.value(arguments[2], TYPES["u32"]),
        )

        def run(warp, lanes):
            asked = lanes & (members(warp) >> np.arange(WARP, dtype="u4") & 1).astype(bool)
            put(warp, lanes, np.full(WARP, function(get(warp), asked), TYPES[suffixes[-1]]))

        return run

    def make_redux(self, suffixes, arguments):
        """Each lane gets the result of the lanes that its mask names."""
        dtype, put = TYPES[suffixes[-1]], self.setter(arguments[0])
        function, get = REDUCTIONS[suffixes[1]], self.value(arguments[1], dtype)
        masks = self.value(arguments[2], TYPES["u32"])

        def run(warp, lanes):
            x, mine = get(warp), masks(warp)
            result = np.empty(WARP, dtype)
            for mask in set(mine.tolist()):
                named = (mask >> np.arange(WARP) & 1).astype(bool)
                result[mine == mask] = function.reduce(x[named], dtype=dtype)
            put(warp, lanes, result)

        return run

    def make_ldmatrix(self, suffixes, arguments):
        """Lane l gets the pair l % 4 of row l // 4 of each 8 x 8 matrix, whose rows' addresses eight lanes give."""
        if "trans" in suffixes:
            raise MachineError(f"unknown instruction: ldmatrix.{'.'.join(suffixes)}")
        puts, address = [self.setter(t) for t in listed(arguments[0])], self.address(arguments[1], False)

        def run(warp, lanes):
            rows = address(warp, lanes)
            for i, put in enumerate(puts):
                check_vector(rows[8 * i : 8 * i + 8], 16)
                pieces = [warp.program.shared[a : a + 16].view("u4") for a in rows[8 * i : 8 * i + 8]]
                put(warp, lanes, np.concatenate(pieces))

        return run

    def make_stmatrix(self, suffixes, arguments):
        """The other way round."""
        if "trans" in suffixes:
            raise MachineError(f"unknown instruction: stmatrix.{'.'.join(suffixes)}")
        gets, address = [self.value(t, TYPES["u32"]) for t in listed(arguments[1])], self.address(arguments[0], False)

        def run(warp, lanes):
            rows = address(warp, lanes)
            for i, get in enumerate(gets):
                check_vector(rows[8 * i : 8 * i + 8], 16)
                for row, at in enumerate(rows[8 * i : 8 * i + 8]):
                    warp.program.shared[at : at + 16].view("u4")[:] = get(warp)[4 * row : 4 * row + 4]

        return run


def check_vector(addresses, size):
    for a in addresses:
        if a % size:
            raise MachineError(f"{size} bytes at {a:#x} are not aligned")
