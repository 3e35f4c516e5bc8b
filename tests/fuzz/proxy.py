"""Lets programs that speak TCP only talk to a unix socket: proxy.py PORT SOCKET"""

import asyncio
import sys


async def copy(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
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
    await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
    for end in (writer, inner_writer):
        end.close()


async def main():
    server = await asyncio.start_server(connection, "127.0.0.1", int(sys.argv[1]))
    async with server:
        await server.serve_forever()


asyncio.run(main())
