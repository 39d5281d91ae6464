import type { Command } from "./command.ts";
import { allocCreate, allocExtend, allocList, allocLogs, allocRelease, allocShow } from "./commands/alloc.ts";
import { events } from "./commands/events.ts";
import { capacityShow, gpusList, gpusSet, gpusShow } from "./commands/gpus.ts";
import {
  joinTokenCreate,
  joinTokenList,
  joinTokenRevoke,
  tenantsCreate,
  tenantsList,
  tokensCreate,
  tokensList,
  tokensRevoke,
} from "./commands/identity.ts";
import { contextList, contextUse, login } from "./commands/login.ts";
import {
  serversApprove,
  serversDrain,
  serversEnrolments,
  serversRegister,
  serversReject,
  serversRetire,
  serversRevoke,
  serversSet,
  serversUndrain,
} from "./commands/server-operations.ts";
import { serversList, serversShow } from "./commands/servers.ts";

/** Every command, a line each, in the order of `pbd --help`. */
export const commands: readonly Command[] = [
  login,
  contextList,
  contextUse,
  capacityShow,
  allocCreate,
  allocList,
  allocShow,
  allocLogs,
  allocRelease,
  allocExtend,
  serversList,
  serversShow,
  serversRegister,
  serversSet,
  serversEnrolments,
  serversApprove,
  serversReject,
  serversDrain,
  serversUndrain,
  serversRevoke,
  serversRetire,
  gpusList,
  gpusShow,
  gpusSet,
  joinTokenCreate,
  joinTokenList,
  joinTokenRevoke,
  tenantsList,
  tenantsCreate,
  tokensCreate,
  tokensList,
  tokensRevoke,
  events,
];

/** What a noun is, for `pbd --help`. */
export const nouns: Readonly<Record<string, string>> = {
  context: "Controllers you logged in to",
  alloc: "GPUs and containers of a tenant",
  servers: "GPU servers",
  gpus: "GPUs of the fleet",
  "join-token": "Tokens that let agents enrol",
  tenants: "Who owns allocations",
  tokens: "API tokens",
};
