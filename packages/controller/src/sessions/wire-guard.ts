import { PlatformError } from "@palebluedot/shared/errors.ts";
import {
  AgentServiceService,
  SessionRequest,
  UploadLogsRequest,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";

/**
 * Bytes say little about what a message costs: two of them make an element, and an element becomes an object
 * of many properties. Fields are counted before anything is decoded, at a small part of the cost.
 */

/** Far above any honest message: the largest, a hundred durable events or an inventory, has about a thousand. */
const maxFields = 32_768;
/** What an element costs beside its bytes, once decoded. */
const bytesPerField = 64;

/** Field numbers that hold messages, and those messages' own. */
interface Shape {
  readonly [field: number]: Shape;
}
const leaf: Shape = {};
const sessionRequest: Shape = {
  1: leaf,
  2: { 1: { 11: leaf, 12: leaf, 20: leaf }, 2: { 18: leaf }, 3: leaf },
  3: { 3: { 9: leaf, 10: leaf }, 4: leaf },
  4: { 1: leaf, 2: leaf },
  5: { 2: leaf },
  6: leaf,
};
const uploadLogsRequest: Shape = { 2: leaf };

const costs = new WeakMap<SessionRequest, number>();

/** What a message from the wire cost, in bytes: its own and those of the objects it became. */
export const costOf = (request: SessionRequest): number => costs.get(request) ?? 0;

function tooMany(): PlatformError {
  return new PlatformError({
    code: "message-too-complex",
    kind: "invalid",
    message: `a message has more than ${maxFields} fields`,
  });
}

const malformed = (): PlatformError =>
  new PlatformError({ code: "malformed-message", kind: "invalid", message: "a message is not protobuf" });

/** Throws PlatformError `message-too-complex` or `malformed-message`. */
function countFields(bytes: Uint8Array, shape: Shape): number {
  let position = 0;
  let fields = 0;

  function varint(end: number): number {
    let value = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      if (position >= end) throw malformed();
      const byte = bytes[position] ?? 0;
      position += 1;
      // Beyond 2^53 it is no length and no tag; the value is not used then.
      value += (byte & 0x7f) * 2 ** shift;
      if (byte < 0x80) return value;
    }
    throw malformed();
  }

  function scan(end: number, inside: Shape): void {
    while (position < end) {
      fields += 1;
      if (fields > maxFields) throw tooMany();
      const tag = varint(end);
      const wireType = tag % 8;
      if (wireType === 0) varint(end);
      else if (wireType === 1) position += 8;
      else if (wireType === 5) position += 4;
      else if (wireType === 2) {
        const length = varint(end);
        if (length > end - position) throw malformed();
        const nested = inside[Math.floor(tag / 8)];
        if (nested === undefined) position += length;
        else scan(position + length, nested);
      } else throw malformed();
    }
    if (position > end) throw malformed();
  }

  scan(bytes.length, shape);
  return fields;
}

/** The agent service as its listener takes it: messages are looked at before they are decoded. */
export const guardedAgentService = {
  session: {
    ...AgentServiceService.session,
    requestDeserialize(bytes: Buffer): SessionRequest {
      const fields = countFields(bytes, sessionRequest);
      const request = SessionRequest.decode(bytes);
      costs.set(request, bytes.length + fields * bytesPerField);
      return request;
    },
  },
  uploadLogs: {
    ...AgentServiceService.uploadLogs,
    requestDeserialize(bytes: Buffer): UploadLogsRequest {
      countFields(bytes, uploadLogsRequest);
      return UploadLogsRequest.decode(bytes);
    },
  },
} as const;
