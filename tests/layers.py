#!/usr/bin/env python3
"""Whether the files of each crate depend on one another in one direction only, and the crates, too.

Usage: tests/layers.py [--known FILE=FILE...] [CRATE...]; without CRATE all of them. Each circle is printed, and the
exit status is 1 if there is one, or if a crate names one that is above it. Circles all of whose files are given
with --known are passed over.

A file depends on the file that defines what a path in it leads to (crate::, super::, self::, or a module of its own
by its name). What is for tests alone does not count, and neither does the declaration of a module.
"""
import os
import re
import sys

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# From the bottom: none may name one that comes after it.
CRATES = [("guest-image/agent", "mce_relay_agent"), ("relay", "mce_relay"), ("vmm", "mce_relay_vmm"), ("cli", "mce_relay_cli")]
NAME = r"[A-Za-z_]\w*"


def without_tests(text):
    """The text without comments, and without items that are for tests alone."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r'"(?:\\.|[^"\\])*"', '""', text, flags=re.S)
    out, at = [], 0
    for found in re.finditer(r"#\[cfg\((?:all\()?test\b[^\n]*\]\s*", text):
        if found.start() < at:
            continue
        out.append(text[at : found.start()])
        depth, at = 0, found.end()
        while at < len(text):
            char = text[at]
            at += 1
            depth += (char in "([{") - (char in ")]}")
            if depth == 0 and char in ";}":
                break
    return "".join(out) + text[at:]


def leaves(tree, before=""):
    """The paths of a tree of imports, and what each is called here."""
    tree = tree.strip()
    if "{" not in tree:
        path, _, name = tree.partition(" as ")
        path = (before + path.strip()).removesuffix("::self")
        return [(path, name.strip() or path.rsplit("::", 1)[-1])]
    head, _, body = tree.partition("{")
    parts, depth, part = [], 0, ""
    for char in body[: body.rindex("}")]:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += char
    found = []
    for part in parts + [part]:
        if part.strip():
            found += leaves(part, before + head.strip())
    return found


class Crate:
    """The files of a crate by their modules."""

    def __init__(self, directory):
        root = os.path.join(TOP, directory, "src")
        self.files, self.tests = {}, set()
        for place, _, names in os.walk(root):
            for name in names:
                path = os.path.join(place, name)
                module = os.path.relpath(path, root)[:-3].split(os.sep)
                if not name.endswith(".rs") or module in (["main"], ["bin"]):
                    continue
                if module[-1] in ("mod", "lib"):
                    module.pop()
                self.files[tuple(module)] = path
        self.texts = {}
        for module, path in self.files.items():
            with open(path, encoding="utf-8") as file:
                whole = file.read()
            self.texts[module] = without_tests(whole)
            for name in re.findall(r"#\[cfg\(test\)\]\s*(?:pub(?:\([^)]*\))? )?mod (\w+);", whole):
                self.tests.add(module + (name,))

    def place(self, module, path):
        """The absolute path that `path` is in `module`, or None where it leads elsewhere."""
        parts = path.split("::")
        if parts[0] == "crate":
            return tuple(parts[1:])
        if parts[0] == "self":
            return module + tuple(parts[1:])
        if parts[0] == "super":
            while parts and parts[0] == "super":
                module, parts = module[:-1], parts[1:]
            return module + tuple(parts)
        if module + (parts[0],) in self.files:
            return module + tuple(parts)
        return None

    def exported(self, where, seen=()):
        """The same behind re-exports."""
        for end in range(len(where), 0, -1):
            module, rest = where[:end], where[end:]
            if module not in self.files:
                continue
            if not rest or rest[0] in seen:
                return module
            public = re.findall(r"\bpub(?:\([^)]*\))? use ([^;]+);", self.texts[module])
            for path, name in [leaf for tree in public for leaf in leaves(tree)]:
                if name in (rest[0], "*"):
                    target = self.place(module, path)
                    if target and name != "*":
                        return self.exported(target + rest[1:], seen + (rest[0],))
            return module
        return () if () in self.files else None

    def uses(self, module):
        """The files that a file names, but for itself."""
        text = self.texts[module]
        paths = []
        for tree in re.findall(r"\buse ([^;]+);", text):
            paths += [path for path, _ in leaves(tree)]
        rest = re.sub(r"\buse [^;]+;", "", text)
        paths += re.findall(rf"(?<![\w:])(?:crate|super|self)(?:::{NAME})+", rest)
        paths += re.findall(rf"(?<![\w:.])[a-z]\w*(?:::{NAME})+", rest)
        found = set()
        for path in paths:
            where = self.place(module, path)
            if where is not None:
                file = self.exported(where)
                # The crate's own file names all others by declaring them.
                if file and file != module:
                    found.add(file)
        return found


def circles(graph):
    """Sets of files each of which leads to each other (Tarjan)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            circle = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for node in graph:
        if node not in order:
            visit(node)
    return found


def main(arguments):
    sys.setrecursionlimit(10_000)
    known, chosen = set(), []
    while arguments:
        argument = arguments.pop(0)
        if argument == "--known":
            known.update(arguments.pop(0).split("="))
        else:
            chosen.append(argument)
    for crate in chosen:
        if crate not in (directory for directory, _ in CRATES):
            names = ", ".join(directory for directory, _ in CRATES)
            print(f"{crate} is no crate of this project; expected one of {names}")
            return 2
    bad = 0
    for level, (directory, _) in enumerate(CRATES):
        if (chosen and directory not in chosen) or not os.path.isdir(os.path.join(TOP, directory, "src")):
            continue
        crate = Crate(directory)
        graph = {}
        for module in sorted(crate.files):
            if module not in crate.tests:
                graph[module] = sorted(crate.uses(module) - crate.tests)
            for _, above in CRATES[level + 1 :]:
                if re.search(rf"\b{above}\b", crate.texts[module]):
                    print(f"{os.path.relpath(crate.files[module], TOP)} names {above}, which is above it")
                    bad += 1
        graph = {node: [other for other in others if other in graph] for node, others in graph.items()}
        for circle in circles(graph):
            paths = [os.path.relpath(crate.files[module], TOP) for module in circle]
            if set(paths) <= known:
                continue
            bad += 1
            print(f"a circle of {len(paths)} files:")
            for module, path in zip(circle, paths):
                within = [
                    os.path.relpath(crate.files[other], TOP) for other in graph[module] if other in circle
                ]
                print(f"  {path} -> {', '.join(within)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
