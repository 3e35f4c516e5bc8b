"""Lets programs that speak TCP only talk to a unix socket: proxy.py PORT SOCKET

A stream of events that does not end is not asked for: `follow=true` in a request is made `follow=false`.
"""

import asyncio
import re
import sys


def ending(request):
    return re.sub(rb"^(GET /api/v1/relay\.events\?\S*?follow=)true", rb"\1false", request)


async def copy(reader, writer, change=lambda data: data):
    try:
        while data := await reader.read(65536):
            writer.write(change(data))
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def connection(reader, writer):
    try:
        inner_reader, inner_writer = await asyncio.open_unix_connection(sys.argv[2])
    except OSError as error:
        print(f"proxy: {error}", file=sys.stderr)
        writer.close()
        return
    await asyncio.gather(copy(reader, inner_writer, ending), copy(inner_reader, writer))
    for end in (writer, inner_writer):
        end.close()


async def main():
    server = await asyncio.start_server(connection, "127.0.0.1", int(sys.argv[1]))
    async with server:
        await server.serve_forever()


asyncio.run(main())
