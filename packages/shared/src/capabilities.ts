/**
 * What an agent can do beyond the first protocol version. Numbered and dated; never renumbered, never
 * given another meaning. Agent and controller one minor version apart consult this list.
 *
 * 1 (2026-11) containers   runs containers on a Docker-compatible engine
 * 2 (2026-11) logs         opens UploadLogs when told
 */
export const agentCapabilities = ["containers", "logs"] as const;
export type AgentCapability = (typeof agentCapabilities)[number];
