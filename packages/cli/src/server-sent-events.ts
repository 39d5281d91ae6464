export interface ServerSentEvent {
  readonly id: string | undefined;
  readonly event: string;
  readonly data: string;
}

/** Characters of one message; a longer one ends the stream, so that a broken server cannot fill the memory. */
const maxMessageCharacters = 4 * 1024 * 1024;

/**
 * The messages of a `text/event-stream`, as WHATWG's HTML standard, section 9.2.6 has them: lines end with
 * CR, LF or CRLF, an empty line ends a message, comments and a message without its end are dropped.
 */
export async function* readServerSentEvents(
  chunks: AsyncIterable<Uint8Array>,
): AsyncGenerator<ServerSentEvent, void, undefined> {
  const decoder = new TextDecoder();
  let rest = "";
  let id: string | undefined;
  let event = "message";
  let data: string[] = [];
  for await (const chunk of chunks) {
    rest += decoder.decode(chunk, { stream: true });
    if (rest.length > maxMessageCharacters) throw new Error("a message of the event stream is too long");
    for (;;) {
      // A CR at the very end may be half of a CRLF: wait for what follows.
      const end = /\r\n|\n|\r(?=[^])/.exec(rest);
      if (end === null) break;
      const line = rest.slice(0, end.index);
      rest = rest.slice(end.index + end[0].length);
      if (line === "") {
        if (data.length > 0) yield { id, event, data: data.join("\n") };
        event = "message";
        data = [];
        continue;
      }
      const colon = line.indexOf(":");
      const field = colon === -1 ? line : line.slice(0, colon);
      const value = colon === -1 ? "" : line.slice(colon + 1).replace(/^ /, "");
      if (field === "id") id = value;
      else if (field === "event") event = value;
      else if (field === "data") data.push(value);
    }
  }
}
