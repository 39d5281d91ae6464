import { expect, test } from "vitest";
import { SessionRequest } from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import { costOf, guardedAgentService } from "./wire-guard.ts";

const requestDeserialize = (bytes: Buffer): SessionRequest =>
  guardedAgentService.session.requestDeserialize(bytes);

/** `body` as field `field` of a message. */
function field(number: number, body: Buffer): Buffer {
  const length: number[] = [];
  for (let rest = body.length; ; rest = Math.floor(rest / 128)) {
    length.push(rest >= 128 ? (rest % 128) + 128 : rest);
    if (rest < 128) break;
  }
  return Buffer.concat([Buffer.from([number * 8 + 2, ...length]), body]);
}

const empties = (number: number): Buffer => Buffer.alloc(200_000, Buffer.from([number * 8 + 2, 0]));

test.each([
  ["samples", field(4, empties(1))],
  ["events", field(5, empties(2))],
  ["disks of the host", field(2, field(1, empties(11)))],
  ["MIG devices of a GPU", field(2, field(2, Buffer.alloc(300_000, Buffer.from("920100", "hex"))))],
  ["holders of a workload", field(3, field(3, empties(10)))],
  ["capabilities", field(1, empties(3))],
  ["fields that nobody knows", field(4, empties(9))],
  ["messages in one", empties(4)],
])("a hundred thousand %s are refused undecoded", (_what, bytes) => {
  expect(() => requestDeserialize(bytes)).toThrow(expect.objectContaining({ code: "message-too-complex" }));
});

test.each([
  ["a length behind the end", "0aff07deadbeef"],
  ["a group", "0b0c"],
  ["an endless number", "08ffffffffffffffffffffffff"],
  ["half a number", "2503"],
])("%s is malformed", (_what, hex) => {
  expect(() => requestDeserialize(Buffer.from(hex, "hex"))).toThrow(
    expect.objectContaining({ code: "malformed-message" }),
  );
});

test("an honest message is decoded as ever, negative numbers too, and has a cost", () => {
  const message = SessionRequest.fromPartial({
    message: {
      $case: "observedState",
      value: {
        generation: 4,
        workloads: [{ allocationId: "a", exitCode: -1, ports: [{ containerPort: 22, hostPort: 30_022 }] }],
      },
    },
  });
  const bytes = Buffer.from(SessionRequest.encode(message).finish());
  const decoded = requestDeserialize(bytes);
  expect(decoded).toEqual(message);
  expect(costOf(decoded)).toBeGreaterThan(bytes.length);
});
