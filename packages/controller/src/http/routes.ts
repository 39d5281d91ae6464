import { allocationRoutes } from "../allocations/routes.ts";
import { joinTokenRoutes } from "../enrolment/routes.ts";
import { eventRoutes } from "../events/routes.ts";
import { gpuRoutes } from "../gpus/routes.ts";
import { identityRoutes } from "../identity/routes.ts";
import { serverRoutes } from "../servers/routes.ts";
import type { HttpContext } from "./context.ts";
import type { Route } from "./route.ts";
import { systemRoutes } from "./system-routes.ts";

/** Every route of the API, a feature a line. */
export function allRoutes(context: HttpContext): readonly Route[] {
  const routes: Route[] = [
    ...serverRoutes(context),
    ...gpuRoutes(context),
    ...allocationRoutes(context),
    ...joinTokenRoutes(context),
    ...eventRoutes(context),
    ...identityRoutes(context),
    ...systemRoutes(context, () => routes),
  ];
  return routes;
}
