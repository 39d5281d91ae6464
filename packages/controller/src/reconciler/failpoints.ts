/**
 * Named places where a crash would hurt most. A test starts the controller once for each name, lets it
 * die there with SIGKILL, starts it again and checks that nothing was lost or done twice.
 */
export const failpointNames = [
  // POST /allocations: committed, but not yet answered
  "allocation-accepted",
  // the scheduler has decided, nothing is written
  "allocation-decided",
  // claims, server generation and event are committed, nobody was told
  "allocation-claimed",
  // the desired document was read, not sent
  "desired-state-loaded",
  // written to the stream
  "desired-state-pushed",
  // the agent's report arrived, not written
  "observation-received",
  // allocation is active in the database, nothing after that happened
  "allocation-activated",
  // the relay gave events their sequence, sinks know nothing
  "events-sequenced",
] as const;

export type FailpointName = (typeof failpointNames)[number];

export interface Failpoints {
  hit(name: FailpointName): void;
}

/** In production all points are no-ops. With a name (`PALEBLUEDOT_FAILPOINT`) the process kills itself there. */
export function createFailpoints(dieAt: string | undefined): Failpoints {
  if (dieAt === undefined) return { hit: () => undefined };
  if (!(failpointNames as readonly string[]).includes(dieAt)) {
    throw new Error(`unknown fail-point ${JSON.stringify(dieAt)}; known: ${failpointNames.join(", ")}`);
  }
  return {
    hit: (name) => {
      // SIGKILL: no exit handler may tidy up, just as in a power cut.
      if (name === dieAt) process.kill(process.pid, "SIGKILL");
    },
  };
}
