/** One piece of a container's output; a frame of the engine may arrive in several. */
export interface LogFrame {
  readonly stream: "stdout" | "stderr";
  readonly data: Buffer;
}

const maxPieceBytes = 64 * 1024;

/**
 * Takes the engine's multiplexed output apart: 8 bytes of header (stream, 0, 0, 0, length as big-endian
 * uint32), then the data. Data is passed on as it arrives, so a frame of gigabytes costs no memory. Output
 * that does not begin like a frame (a container with a terminal) is passed on as standard output.
 */
export async function* demultiplex(chunks: AsyncIterable<Buffer>): AsyncGenerator<LogFrame> {
  let header = Buffer.alloc(0);
  let remaining = 0;
  let stream: LogFrame["stream"] = "stdout";
  let raw: boolean | undefined;
  for await (const chunk of chunks) {
    let rest = chunk;
    if (raw === undefined) {
      const candidate = Buffer.concat([header, rest]);
      if (candidate.length < 8 && (candidate[0] ?? 0) <= 2) {
        header = candidate;
        continue;
      }
      raw = !((candidate[0] ?? 9) <= 2 && candidate.readUIntBE(1, 3) === 0);
      header = Buffer.alloc(0);
      rest = candidate;
    }
    while (rest.length > 0) {
      if (raw) {
        yield { stream: "stdout", data: rest.subarray(0, maxPieceBytes) };
        rest = rest.subarray(maxPieceBytes);
        continue;
      }
      if (remaining === 0) {
        const need = 8 - header.length;
        header = Buffer.concat([header, rest.subarray(0, need)]);
        rest = rest.subarray(need);
        if (header.length < 8) break;
        stream = header[0] === 2 ? "stderr" : "stdout";
        remaining = header.readUInt32BE(4);
        header = Buffer.alloc(0);
        continue;
      }
      const take = Math.min(remaining, rest.length, maxPieceBytes);
      yield { stream, data: rest.subarray(0, take) };
      rest = rest.subarray(take);
      remaining -= take;
    }
  }
}
