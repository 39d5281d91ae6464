import type { Command } from "./command.ts";
import { allocCreate, allocExtend, allocList, allocLogs, allocRelease, allocShow } from "./commands/alloc.ts";
import { events } from "./commands/events.ts";
import { capacityShow, gpusList, gpusShow } from "./commands/gpus.ts";
import {
  joinTokenCreate,
  joinTokenList,
  joinTokenRevoke,
  tenantsCreate,
  tenantsList,
  tokensCreate,
} from "./commands/identity.ts";
import { contextList, contextUse, login } from "./commands/login.ts";
import { serversApprove, serversList, serversShow } from "./commands/servers.ts";

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
  serversApprove,
  gpusList,
  gpusShow,
  joinTokenCreate,
  joinTokenList,
  joinTokenRevoke,
  tenantsList,
  tenantsCreate,
  tokensCreate,
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
