"""Prints the kernel log of a Linux guest out of a dump of its memory, by drgn and without debug information.

drgn opens the file as a kernel's core (it takes VMCOREINFO from its notes) and translates the kernel's
addresses by the kernel's own page tables, both out of that file. What its own helper for the log takes from
debug information, this takes from VMCOREINFO, which has it for this very purpose
(kernel/printk/printk_ringbuffer.c; a kernel of Linux 5.10 or later).

usage: dmesg.py FILE
"""

import re
import sys

import drgn

# enum desc_state, in the upper two bits of state_var.
COMMITTED, FINALIZED = 1, 2
# A record without text has this bit in the positions of its text.
DATALESS = 1
# A text begins with the number of its descriptor.
ID = 8


class Core:
    """A kernel's core, and what it says of the kernel's structures."""

    def __init__(self, path):
        self.prog = drgn.Program()
        self.prog.set_core_dump(path)
        if not self.prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
            sys.exit(f"{path}: drgn does not take it for a Linux kernel's core")
        text = self.prog["VMCOREINFO"].string_().decode()
        self.said = dict(line.split("=", 1) for line in text.splitlines())

    def symbol(self, name):
        return int(self.said[f"SYMBOL({name})"], 16)

    def size(self, name):
        return int(self.said[f"SIZE({name})"])

    def offset(self, name):
        return int(self.said[f"OFFSET({name})"])

    def word(self, address):
        return int.from_bytes(self.prog.read(address, 8), "little")

    def field(self, address, name):
        return self.word(address + self.offset(name))


def records(core):
    """Each record of the log, in order: when it was made, in nanoseconds, and its text."""
    ring = core.word(core.symbol("prb"))
    descs = ring + core.offset("printk_ringbuffer.desc_ring")
    texts = ring + core.offset("printk_ringbuffer.text_data_ring")
    count = 1 << (core.field(descs, "prb_desc_ring.count_bits") & 0xFFFFFFFF)
    size = 1 << (core.field(texts, "prb_data_ring.size_bits") & 0xFFFFFFFF)
    data = core.field(texts, "prb_data_ring.data")
    at = core.field(descs, "prb_desc_ring.tail_id")
    head = core.field(descs, "prb_desc_ring.head_id")
    while True:
        index = at % count
        desc = core.field(descs, "prb_desc_ring.descs") + index * core.size("prb_desc")
        info = core.field(descs, "prb_desc_ring.infos") + index * core.size("printk_info")
        state = core.field(desc, "prb_desc.state_var")
        if state & ((1 << 62) - 1) == at and state >> 62 in (COMMITTED, FINALIZED):
            place = desc + core.offset("prb_desc.text_blk_lpos")
            begin = core.field(place, "prb_data_blk_lpos.begin")
            end = core.field(place, "prb_data_blk_lpos.next")
            length = core.field(info, "printk_info.text_len") & 0xFFFF
            text = b""
            if not begin & DATALESS:
                # A text that would reach the end of the ring is at its beginning.
                if begin // size != end // size:
                    begin = 0
                start = begin % size + ID
                text = core.prog.read(data + start, min(length, end % size - start))
            yield core.field(info, "printk_info.ts_nsec"), text.decode(errors="replace")
        if at == head:
            return
        at = (at + 1) & ((1 << 62) - 1)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    core = Core(sys.argv[1])
    for nanoseconds, text in records(core):
        seconds, rest = divmod(nanoseconds, 1_000_000_000)
        for line in re.split("\n", text):
            print(f"[{seconds:5}.{rest // 1000:06}] {line}")


main()
