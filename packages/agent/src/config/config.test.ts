import { expect, test } from "vitest";
import { isPlatformError } from "@palebluedot/shared/errors.ts";
import { loadConfig } from "./config.ts";

const needed = {
  PALEBLUEDOT_CONTROLLER: "controller.example.com:8443",
  PALEBLUEDOT_CA_FINGERPRINT: "ab".repeat(32),
};

test("defaults, and flags over the environment", () => {
  const config = loadConfig({ ...needed, PALEBLUEDOT_DATA_DIR: "/a" }, { PALEBLUEDOT_DATA_DIR: "/b" });
  expect(config.PALEBLUEDOT_DATA_DIR).toBe("/b");
  expect(config.PALEBLUEDOT_TELEMETRY_INTERVAL_MS).toBe(10_000);
  expect(config.PALEBLUEDOT_METRICS_PORT).toBeUndefined();
  expect(config.PALEBLUEDOT_SYSFS_ROOT).toBe("/sys");
});

test("a fingerprint is taken in every form that tools print", () => {
  const colons = `SHA256=${"AB:".repeat(31)}AB`;
  expect(loadConfig({ ...needed, PALEBLUEDOT_CA_FINGERPRINT: colons }).PALEBLUEDOT_CA_FINGERPRINT).toBe(
    "ab".repeat(32),
  );
});

test("all faults are told together, by name", () => {
  let error: unknown;
  try {
    loadConfig({ PALEBLUEDOT_CA_FINGERPRINT: "short", PALEBLUEDOT_TELEMETRY_INTERVAL_MS: "10" });
  } catch (thrown) {
    error = thrown;
  }
  if (!isPlatformError(error)) throw new Error("not refused");
  expect(error.code).toBe("config-invalid");
  for (const name of [
    "PALEBLUEDOT_CONTROLLER is not set",
    "PALEBLUEDOT_CA_FINGERPRINT",
    "PALEBLUEDOT_TELEMETRY_INTERVAL_MS",
  ]) {
    expect(error.message).toContain(name);
  }
});

test("metrics are for the host itself unless the operator says otherwise", () => {
  expect(loadConfig(needed).PALEBLUEDOT_METRICS_HOST).toBe("127.0.0.1");
});

test("registries that are allowed come as a comma list", () => {
  expect(loadConfig(needed).PALEBLUEDOT_REGISTRY_ALLOW).toEqual([]);
  const given = { ...needed, PALEBLUEDOT_REGISTRY_ALLOW: "localhost:5000, 127.0.0.1:5001," };
  expect(loadConfig(given).PALEBLUEDOT_REGISTRY_ALLOW).toEqual(["localhost:5000", "127.0.0.1:5001"]);
});

test("a metrics certificate without its key is refused", () => {
  const given = { ...needed, PALEBLUEDOT_METRICS_TLS_CERT_FILE: "/etc/palebluedot/metrics.pem" };
  expect(() => loadConfig(given)).toThrow(
    /PALEBLUEDOT_METRICS_TLS_KEY_FILE certificate and key belong together/,
  );
});
