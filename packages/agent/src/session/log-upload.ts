import type { ClientWritableStream } from "@grpc/grpc-js";
import { errorMessage, isPlatformError, PlatformError } from "@palebluedot/shared/errors.ts";
import type {
  AgentServiceClient,
  CommandResult,
  OpenLogs,
  UploadLogsRequest,
} from "@palebluedot/shared/generated/palebluedot/agent/v1/agent.ts";
import type { Reconciler } from "../reconcile/types.ts";

/**
 * Carries one container's output to the controller on an RPC of its own. Ends with the log, when the controller
 * cancels (nobody reads any more), or when the signal aborts. The result says whether it could be opened.
 */
export async function uploadLogs(options: {
  readonly client: AgentServiceClient;
  readonly reconciler: Pick<Reconciler, "logs">;
  readonly commandId: string;
  readonly request: OpenLogs;
  readonly signal: AbortSignal;
}): Promise<CommandResult> {
  const { request, commandId } = options;
  const abort = new AbortController();
  const signal = AbortSignal.any([options.signal, abort.signal]);
  const call = options.client.uploadLogs(() => abort.abort(new Error("the upload ended")));
  call.on("error", () => abort.abort(new Error("the upload broke off")));
  try {
    // At once, so that the reader knows that the log was found even if it stays silent.
    await write(call, { streamId: request.streamId, chunks: [] }, signal);
    for await (const chunk of options.reconciler.logs(request, signal)) {
      if (signal.aborted) break;
      await write(call, { streamId: "", chunks: [chunk] }, signal);
    }
    call.end();
    return { id: commandId, ok: true, errorCode: "", errorMessage: "" };
  } catch (error) {
    if (signal.aborted) {
      call.cancel();
      return { id: commandId, ok: true, errorCode: "", errorMessage: "" };
    }
    const code = isPlatformError(error) ? error.code : "log-stream-failed";
    call.cancel();
    return { id: commandId, ok: false, errorCode: code, errorMessage: errorMessage(error) };
  }
}

function write(
  call: ClientWritableStream<UploadLogsRequest>,
  message: UploadLogsRequest,
  signal: AbortSignal,
): Promise<void> {
  if (call.write(message)) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const onAbort = (): void => {
      call.removeListener("drain", onDrain);
      reject(
        new PlatformError({ code: "log-stream-failed", kind: "unavailable", message: "the upload ended" }),
      );
    };
    const onDrain = (): void => {
      signal.removeEventListener("abort", onAbort);
      resolve();
    };
    call.once("drain", onDrain);
    signal.addEventListener("abort", onAbort, { once: true });
  });
}
