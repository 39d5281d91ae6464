import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["packages/*/src/**/*.test.ts", "test/**/*.test.ts", "installers/**/*.test.ts"],
    // Real databases, container engines and child processes: slow machines need time, and a hang is
    // still a failure.
    testTimeout: 60_000,
    hookTimeout: 120_000,
    maxWorkers: 2,
  },
});
