import type { Sql } from "postgres";
import { connect } from "./connect.ts";

/** One statement as the server executed it. */
export interface ExecutedPlan {
  readonly query: string;
  readonly durationMs: number;
  /** Tables, or indexes of theirs, that were read from one end to the other. */
  readonly scanned: readonly string[];
}

export interface PlanRecorder {
  readonly sql: Sql;
  /** In the order of execution, checks of foreign keys included; empties the record. */
  take(): ExecutedPlan[];
}

/**
 * A connection whose server tells the plan of every statement that it really executed, generic plans and what
 * constraints run included (PostgreSQL's own module auto_explain; needs a superuser).
 */
export function recordPlans(url: string): PlanRecorder {
  let plans: ExecutedPlan[] = [];
  const sql = connect(url, {
    applicationName: "palebluedot-plans",
    maxConnections: 1,
    onNotice(message) {
      const json = /^duration: ([\d.]+) ms\s+plan:\s*(\{.*)$/s.exec(message);
      if (json === null) return;
      const { "Query Text": query, Plan: plan } = JSON.parse(json[2] ?? "{}") as {
        "Query Text": string;
        Plan: unknown;
      };
      plans.push({ query, durationMs: Number(json[1]), scanned: scannedTables(plan) });
    },
    settings: {
      session_preload_libraries: "auto_explain",
      "auto_explain.log_min_duration": "0",
      "auto_explain.log_format": "json",
      "auto_explain.log_level": "notice",
      "auto_explain.log_nested_statements": "on",
    },
  });
  return {
    sql,
    take() {
      const taken = plans;
      plans = [];
      return taken;
    },
  };
}

/** An index read without a condition is read from one end to the other, too. */
function scannedTables(node: unknown): string[] {
  if (Array.isArray(node)) return node.flatMap(scannedTables);
  if (typeof node !== "object" || node === null) return [];
  const members = new Map<string, unknown>(Object.entries(node));
  const type = members.get("Node Type");
  const whole =
    type === "Seq Scan" ||
    ((type === "Index Scan" || type === "Index Only Scan" || type === "Bitmap Index Scan") &&
      !members.has("Index Cond"));
  const table = members.get("Index Name") ?? members.get("Relation Name");
  return [
    ...(whole && typeof table === "string" ? [table] : []),
    ...[...members.values()].flatMap(scannedTables),
  ];
}
