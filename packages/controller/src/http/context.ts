import type { AllocationService } from "../allocations/types.ts";
import type { Dependencies } from "../dependencies.ts";
import type { EnrolmentService } from "../enrolment/types.ts";
import type { EventFeature } from "../events/feature.ts";
import type { IdentityService } from "../identity/identity.ts";
import type { ServerStates } from "../servers/state-machine.ts";
import type { SessionRegistry } from "../sessions/types.ts";
import type { TelemetryStore } from "../telemetry/types.ts";

export interface ReadinessCheck {
  readonly name: string;
  readonly ready: boolean;
  readonly message: string;
}

/** What the routes work with: the features, built in main.ts. */
export interface HttpContext {
  readonly deps: Dependencies;
  readonly identity: IdentityService;
  readonly enrolment: EnrolmentService;
  readonly sessions: Pick<SessionRegistry, "openLogs">;
  readonly telemetry: Pick<TelemetryStore, "latest" | "window">;
  readonly events: Pick<EventFeature, "list" | "subscribe" | "poke">;
  readonly allocations: AllocationService;
  readonly serverStates: ServerStates;
  /** These servers, or GPUs in them, were changed by an operator: scheduler and sessions must reread. */
  readonly fleetChanged: (serverIds: readonly string[]) => void;
  readonly readiness: () => Promise<readonly ReadinessCheck[]>;
  readonly version: string;
}
