/** Facts of the agent link that both sides must agree on. */

/**
 * The name in every controller listener's certificate, and the one that agents verify whatever address
 * they dial. The authority is private and signs `serverAuth` for controllers only, so the dialled name adds
 * nothing, and a load balancer or an address needs no new certificate.
 */
export const controllerTlsName = "controller.palebluedot.internal";

/** Most of what one message may hold, both ways on the control stream. */
export const maxSessionMessageBytes = 4 * 1024 * 1024;

/** Enrolment messages are small; anything bigger is not ours. */
export const maxEnrolmentMessageBytes = 64 * 1024;

/** URI in an agent certificate's subject alternative name. */
export const serverUriPrefix = "palebluedot://server/";
