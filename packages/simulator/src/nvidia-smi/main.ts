/** Entry of the simulated nvidia-smi process. */
import { enableCompileCache } from "node:module";

// The tool is started often; compiled code is kept between starts.
enableCompileCache();
// A reader that goes away ends the tool without a word, as SIGPIPE would.
process.stdout.on("error", () => process.exit(141));
const { run } = await import("./cli.ts");
process.exitCode = await run(process.argv.slice(2), process.env);
